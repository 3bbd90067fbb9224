"""Tests run side by side, one process for each core; so each, and what it starts, has one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
