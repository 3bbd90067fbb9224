#!/usr/bin/env bash
# Builds main.cpp with g++ against the torch that PYTHON imports: ./build.sh OUT
set -euo pipefail
root=$("${PYTHON:-python}" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)")
here=$(cd "$(dirname "$0")" && pwd)
"${CXX:-g++}" -std=c++20 -O1 -I"$root/include" -I"$root/include/torch/csrc/api/include" "$here/main.cpp" -o "$1" \
  -L"$root/lib" -Wl,-rpath,"$root/lib" -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
