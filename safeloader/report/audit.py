"""The audit of a stream: a line of JSON per delivered batch, in `safeloader_audit_<pool>.jsonl` in the run's folder.

    {"audit": 1, "pool": "train", "seed": 7, "stream": 0, "first_ticket": 0, "safeloader": …, "torch": …, "numpy": …}
    {"ticket": 0, "cases": ["case_004", "case_017"], "checksum": "9f2c…", "parts": {"data": "01ab…", "keys": …}}
    …

Each start of a pool writes the first kind of line, its header: what identifies the stream. Runs that continue append:
a ticket may stand there more than once, and the last line counts. A ticket that ended in an exception has no line. If
storage stalls so long that lines are left out, the next line says how many (`records_left_out`). Here is how the file
is written; `report.comparison` reads it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from safeloader.report.journal import Journal
from safeloader.report.versions import version_of

FORMAT: Final = 1
"""Of the lines; stands in each header as `audit`."""
FILE_PATTERN: Final = re.compile(r"safeloader_audit_([^.]+)\.jsonl")
"""Names of audits; what was put aside when a training began anew has another dot, and a date after it."""
VERSIONS: Final = ("safeloader", "torch", "numpy")
"""Packages that a stream may depend on; their versions stand in each header."""
MAX_QUEUED: Final = 20_000
"""Lines kept while the file can't be written: about 20 MB."""
_MAX_NAME_CHARS: Final = 100
_FLUSH_S: Final = 1.0


def audit_file(pool: str) -> str:
    """The name of a pool's audit: whatever the pool is called, a file name without a dot in its middle.

    Letters, digits, "-" and "_" stand for themselves, anything else is written as in a URL: "train@1" is "train%401".
    """
    safe = re.sub("[^A-Za-z0-9_-]", lambda found: "".join(f"%{byte:02X}" for byte in _encoded(found[0])), pool)
    if len(safe) > _MAX_NAME_CHARS:  # file names have at most 255 bytes; two long names stay two
        safe = f"{safe[:_MAX_NAME_CHARS]}-{hashlib.blake2b(_encoded(pool), digest_size=4).hexdigest()}"
    return f"safeloader_audit_{safe or '%'}.jsonl"


@dataclass(frozen=True)
class Header:
    """What identifies a stream, and where in it a pool begins.

    Attributes:
        pool: its name. seed: the root seed. stream: its number. first_ticket: the first that this pool delivers.
    """

    pool: str
    seed: int
    stream: int
    first_ticket: int


class Audit:
    """Writes one pool's audit without ever making anybody wait.

    The supervisor's thread says what was made, the training thread what was delivered.
    """

    def __init__(self, folder: str, header: Header) -> None:
        path = Path(folder) / audit_file(header.pool)
        self._journal = Journal(path, what="a delivered batch", max_queued=MAX_QUEUED, disk_free=False)
        self._made: dict[int, dict[str, Any]] = {}
        versions = {package: version_of(package) for package in VERSIONS}
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        self._journal.write({"audit": FORMAT, **asdict(header), **versions, "at": at})

    def made(self, ticket: int, cases: Sequence[str], checksum: str, parts: Sequence[tuple[str, str]]) -> None:
        """This is what a worker says of its batch; if it is made again, what the last one says counts."""
        self._made[ticket] = {"ticket": ticket, "cases": cases, "checksum": checksum, "parts": dict(parts)}

    def delivered(self, ticket: int) -> None:
        """The consumer has this batch. Said twice, it stands there twice."""
        self._journal.write(self._made[ticket])
        self._made.pop(ticket - 1, None)  # not its own: who was interrupted says it again

    def close(self) -> None:
        """Give what is still to be written a moment."""
        self._journal.close(_FLUSH_S)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
