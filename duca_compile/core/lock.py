"""One lock for all tracing and compiling in the process."""

from __future__ import annotations

import threading

# torch.export and Inductor patch classes and set flags that all threads see, so one thread at a time. Running what is
# compiled takes no lock, but for submodules that run as they are (frontend/opaque.py).
COMPILING = threading.RLock()
