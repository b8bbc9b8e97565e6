"""A benchmark that fails, or is stopped, in the middle leaves what it has measured until then."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.common import Benchmark, Size, Table


@dataclass(frozen=True)
class Row:
    """One measurement."""

    contestant: str
    round: int


class Fragile(Benchmark[Row]):
    """Takes minutes, were it a real one."""

    name = "fragile"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {"rounds": 3}
    tiny: ClassVar[Mapping[str, Size]] = {}

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Two."""
        return [{"contestant": "stock"}, {"contestant": "safeloader"}]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Fails in the end."""
        if (number, case["contestant"]) == (2, "safeloader"):
            raise RuntimeError("the node's time is up")
        return [Row(case["contestant"], number)]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Who was measured how often."""
        return [Table("Measured", ("rows",), ((str(len(rows)),),))]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Not in here: matplotlib keeps its fonts open."""

    def redraw(self, folder: Path) -> None:
        """Says of how many rows."""
        (folder / "fragile.png").write_text(str(len(self.read(folder))))

    def more(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Only in the end."""
        raise AssertionError("not all rounds were measured")


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fragile = Fragile()

    def here(_benchmark: str, case: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [vars(row) for row in fragile.measure(**case)]

    monkeypatch.setattr(common, "_in_a_fresh_process", here)
    with pytest.raises(RuntimeError, match="time is up"):
        fragile.main(["--out", str(tmp_path)])
    pairs = [(number, who) for number in range(3) for who in ("stock", "safeloader")]
    assert [(row.round, row.contestant) for row in fragile.read(tmp_path)] == pairs[:-1]
    about = json.loads((tmp_path / "fragile.json").read_text())  # of the rounds that are whole
    assert about["command"] == "python -m benchmarks.fragile --rounds 2" and about["sizes"] == {"rounds": 2}
    assert about["tables"][0]["lines"] == [["4"]]
    assert (tmp_path / "fragile.png").read_text() == "4"
