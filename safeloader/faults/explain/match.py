"""Which signs a line has: about two hundred of them, tried on logs of any size.

Logs repeat themselves, mostly with other numbers: epochs, progress bars, the same traceback of each worker. So a line
without its digits is looked up first. A sign whose literal, without digits, is not in that can't be in the line, and
what is left to try for all lines of that shape is remembered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from safeloader.faults.explain.model import Cause, Echo, Sign
from safeloader.faults.explain.tracebacks import Tracebacks

_MAX_SHAPES: Final = 4096
_NO_DIGITS: Final = str.maketrans("", "", "0123456789")


class Matcher:
    """Finds the signs of a line, and whose they are."""

    def __init__(self, causes: Sequence[Cause], echoes: Sequence[Echo]) -> None:
        owners: list[Cause | Echo] = [*causes, *echoes]
        self._signs: list[tuple[str, Sign, Cause | Echo]] = [
            (sign.text.translate(_NO_DIGITS), sign, owner) for owner in owners for sign in owner.signs
        ]
        self._compiled = {
            pattern: re.compile(pattern, re.MULTILINE)
            for _, sign, _ in self._signs
            for pattern in (sign.regex, sign.within)
            if pattern
        }
        self._shapes: dict[str, tuple[tuple[Sign, Cause | Echo], ...]] = {}

    def find(self, text: str, tracebacks: Tracebacks) -> list[tuple[Sign, Cause | Echo]]:
        """The signs that a line has.

        Args:
            text: The line.
            tracebacks: Whose frames the line may belong to.
        """
        shape = text.translate(_NO_DIGITS)
        candidates = self._shapes.get(shape)
        if candidates is None:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            candidates = tuple((sign, owner) for literal, sign, owner in self._signs if literal in shape)
            self._shapes[shape] = candidates
        return [(sign, owner) for sign, owner in candidates if self._holds(sign, text, tracebacks)]

    def _holds(self, sign: Sign, text: str, tracebacks: Tracebacks) -> bool:
        return (
            sign.text in text
            and (not sign.regex or bool(self._compiled[sign.regex].search(text)))
            and (not sign.within or bool(self._compiled[sign.within].search(tracebacks.frames)))
        )
