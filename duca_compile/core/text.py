"""Text that comes from elsewhere, as a terminal may be shown it."""


def printable(text: str) -> str:
    """``text`` with escapes in place of control characters, which a terminal would obey, and of broken Unicode."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
