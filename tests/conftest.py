"""What of the environment would decide a test is set here.

Tests run side by side, one process for each core; so each, and what it starts, has one thread. The width and
the colours of the caller's terminal would be the command line's too. How long an example takes depends on what else the
machine does, so none has a deadline.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
