"""The Inductor backend; ``private`` holds every use of torch's private API that compiling needs."""

from duca_compile.core.torch_api import check_torch

check_torch("backend='inductor'")
