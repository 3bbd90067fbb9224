"""One lock for all tracing and compiling in the process."""

from __future__ import annotations

import threading

# torch.export and Inductor patch classes and set flags that all threads see, so only one thread may use them at a time.
# Running compiled code takes no lock, except for opaque submodules (frontend/opaque.py).
COMPILING = threading.RLock()
