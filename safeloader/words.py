"""Words that several messages need."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """A number with its noun, of which an s makes the plural: "1 worker", "12,000 lines"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
