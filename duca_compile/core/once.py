"""Reports each message once."""

from __future__ import annotations

from collections.abc import Hashable


class Once:
    """Remembers what was reported, so that it is not reported again."""

    def __init__(self) -> None:
        self._reported: set[Hashable] = set()

    def first(self, message: Hashable) -> bool:
        """Whether ``message``, or the event that it names, is reported for the first time."""
        if message in self._reported:
            return False
        self._reported.add(message)
        return True
