"""A pool's incidents: kept for its report, logged, and written into the run's folder.

One JSON line each goes into `safeloader_incidents.jsonl`. The lines about quarantined cases are the quarantine's
memory as well: a training that continues in that folder reads them again.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from safeloader.faults.incident import Incident
from safeloader.report import journal, log
from safeloader.report.errand import Errand

logger = logging.getLogger("safeloader")

INCIDENTS_FILE: Final = "safeloader_incidents.jsonl"
MAX_INCIDENTS: Final = 1000
"""Incidents kept in full per pool; beyond, the oldest are only counted."""
_DEATHS: Final = ("worker-death", "worker-hang", "oom-kill", "worker-error")
_FLUSH_S: Final = 1.0
_READ_S: Final = 5.0
"""How long the folder's storage may take to tell what is quarantined."""


class Book:
    """See the module.

    Attributes:
        incidents: the latest. kinds: how many there were of each kind.
        since_batch: what went wrong with workers since the last batch.
        quarantined: cases that the folder's file names for this pool.
        file: where the lines go, or None.

    `on_incident` is called with each, by a thread that lives only while there is one to tell.
    """

    def __init__(self, pool: str, folder: str | None, on_incident: Callable[[Incident], None] | None = None) -> None:
        self._on_incident = on_incident
        self._untold: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self._telling = Errand("safeloader-on-incident", self._tell)
        self.incidents: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self.kinds: Counter[str] = Counter()
        self.since_batch: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self.last: Incident | None = None
        path = None if folder is None else Path(folder) / INCIDENTS_FILE
        self.file = None if path is None else str(path)
        self._journal = None if path is None else journal.Journal(path)
        self.quarantined = () if path is None else _quarantined(path, pool)
        if self.quarantined:
            names = ", ".join(self.quarantined[:5]) + (" …" if len(self.quarantined) > 5 else "")
            logger.warning(
                "SafeLoader: %d cases of pool %r are quarantined since an earlier run (%s): remove their lines from "
                "%s to have them drawn again.", len(self.quarantined), pool, names, path,
            )  # fmt: skip

    def add(self, incident: Incident, *, quietly: bool = False) -> None:
        """Note an incident; `quietly` if a person need not see a line of its own."""
        self.incidents.append(incident)
        self.kinds[incident.kind] += 1
        if incident.kind in _DEATHS:
            self.since_batch.append(incident)
            self.last = incident
        log.say(logging.INFO if quietly else logging.WARNING, f"SafeLoader: {incident.message}")
        if self._journal is not None:
            self._journal.write(incident.to_dict())
        if self._on_incident is not None:
            self._untold.append(incident)
            self._telling.go()

    def _tell(self) -> None:
        """In a thread of its own: the user's function may block. If it raises, Python prints that, and goes on."""
        assert self._on_incident is not None
        while self._untold:
            self._on_incident(self._untold.popleft())

    def settle(self) -> None:
        """A batch was made."""
        self.since_batch.clear()

    def close(self) -> None:
        """Give what is still to be written a moment."""
        log.flush(_FLUSH_S)
        if self._journal is not None:
            self._journal.flush(_FLUSH_S)
        if self._untold:
            self._telling.go()
        self._telling.wait(_FLUSH_S)


def _quarantined(path: Path, pool: str) -> tuple[str, ...]:
    """The cases that the file names; none, and a line that says so, if its storage does not answer in time."""
    cases: dict[str, None] = {}
    errors: list[OSError] = []

    def read() -> None:
        try:
            for record in journal.read(path):
                if record.get("kind") == "quarantine" and record.get("pool") == pool and record.get("case"):
                    cases[str(record["case"])] = None
        except FileNotFoundError:
            pass
        except OSError as error:
            errors.append(error)

    errand = Errand("safeloader-quarantine", read)
    errand.go()
    in_time = errand.wait(_READ_S)
    if errors or not in_time:
        reason = errors[0] if errors else f"no answer within {_READ_S:g} s"
        logger.warning(
            "SafeLoader: the quarantined cases of pool %r could not be read from %s: %s. They are drawn again. "
            "What to do: look at that file system.", pool, path, reason,
        )  # fmt: skip
        return ()
    return tuple(cases)
