"""The ``DUCA_LOG`` environment variable: the package's log on stderr."""

import logging

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str) -> None:
    """Prints the package's log messages of at least ``level``, unless the program has a handler for the root logger.

    Args:
        level: one of ``LEVELS``, in any case. An unknown level has no effect but a warning.
    """
    log = logging.getLogger("duca_compile")
    if level.lower() not in LEVELS:
        log.warning("DUCA_LOG=%s is unknown; choose one of %s", level, ", ".join(LEVELS))
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: not logging.getLogger().handlers)  # otherwise each line is printed twice
    log.addHandler(handler)
    log.setLevel(level.upper())
