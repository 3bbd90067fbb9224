"""Cases of docs/followed.md; see table.py."""

from __future__ import annotations
