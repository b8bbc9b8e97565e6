"""Which cases were found good: so that a check that is cut short goes on where it was.

A line of JSON for each, beside the plans in the dataset's folder: nnU-Net allows nothing else in the folder of the
preprocessed files. A case counts as long as its files have the same size and time, and the plans ask for the same.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeloader.nnunet.check.cases import Expected, Files
from safeloader.report import journal
from safeloader.report.atomic import write_atomically


class Ledger:
    """See the module."""

    def __init__(self, path: Path, expected: Expected) -> None:
        """Read the file, if there is one; lines that are cut off, or about other plans, don't count."""
        self._path = path
        self._expected = json.loads(json.dumps(asdict(expected)))
        self._good: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            for entry in journal.read(path):
                if entry.get("expected") == self._expected and "case" in entry:
                    self._good[entry["case"]] = entry.get("files")

    def has(self, case: str, files: Files) -> bool:
        """Whether this case was found good, and its files have not changed since."""
        return bool(self._good.get(case) == files)

    def add(self, case: str, files: Files) -> None:
        """This case is good.

        Raises:
            OSError: The file can't be written.
        """
        self._good[case] = files
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._line(case) + "\n")

    def tidy(self) -> None:
        """Replace the file by what counts.

        Raises:
            OSError: The file can't be written.
        """
        write_atomically(self._path, "".join(self._line(case) + "\n" for case in sorted(self._good)))

    def _line(self, case: str) -> str:
        return json.dumps({"case": case, "files": self._good[case], "expected": self._expected})
