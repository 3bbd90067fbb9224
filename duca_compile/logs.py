"""What ``DUCA_LOG`` in the environment asks for: the package's log on stderr."""

import logging

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str) -> None:
    """Prints what the package logs from ``level`` on, unless the program has handlers of its own for all logs.

    An unknown level changes nothing; a warning says so.
    """
    log = logging.getLogger("duca_compile")
    if level.lower() not in LEVELS:
        log.warning("DUCA_LOG=%s is unknown; choose one of %s", level, ", ".join(LEVELS))
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: not logging.getLogger().handlers)  # else each line would be printed twice
    log.addHandler(handler)
    log.setLevel(level.upper())
