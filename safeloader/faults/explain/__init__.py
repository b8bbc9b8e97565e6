"""Why a training failed, from whatever text it left: `explain(lines)`.

    bytes ─ reader ─► Line ─► observe ─ verdict ─► Diagnosis ─ words ─► text
                               │   │
                  tracebacks ──┘   └── progress        causes/: what is known, as data

The message "background workers are no longer alive" is an echo, printed last after any failure; the cause is what came
before it. If that is not in the text, the answer is that it is not known, and what is missing: see `verdict.py` for the
rules, and `incident_files.py` for SafeLoader's own files.
"""

from __future__ import annotations

from collections.abc import Iterable

from safeloader.faults.explain.model import Diagnosis, Line
from safeloader.faults.explain.observe import Observer
from safeloader.faults.explain.verdict import judge


def explain(lines: Iterable[Line]) -> Diagnosis:
    """Find the primary cause in the lines of a log.

    Args:
        lines: In order, for example from `reader.read_lines`; read once, and not kept.
    """
    observer = Observer()
    observer.feed_all(lines)
    return judge(observer)


def explain_text(text: str) -> Diagnosis:
    """Find the primary cause in a text."""
    return explain(Line(number, line) for number, line in enumerate(text.splitlines(), 1))
