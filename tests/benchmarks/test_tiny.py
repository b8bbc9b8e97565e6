"""Every benchmark runs at its smallest size and leaves what it should, so that none rots. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import BENCHMARKS
from tests.benchmarks.forked import find

ROOT = Path(__file__).parents[2]
ALONE = BENCHMARKS[0]
"""Is run as a user does, with a fresh process for each measurement; the others by `forked.py`, which is quicker."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the preprocessed brain is kept; it takes half a minute to make, once."""
    return os.environ.get("SAFELOADER_BENCHMARK_DATA") or str(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_at_its_smallest_size(name: str, data: str, tmp_path: Path) -> None:
    benchmark = find(name)
    if (missing := benchmark.missing()) is not None:
        pytest.skip(missing)

    how = [f"benchmarks.{name}"] if name == ALONE else ["tests.benchmarks.forked", name]
    command = [sys.executable, "-m", *how, "--tiny", "--out", str(tmp_path)]
    environment = {**os.environ, "SAFELOADER_BENCHMARK_DATA": data}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)

    assert ended.returncode == 0, ended.stderr[-4000:]
    rows = benchmark.read(tmp_path)
    assert rows and all(isinstance(row, benchmark.row) for row in rows)
    about = json.loads((tmp_path / f"{name}.json").read_text())
    assert about["command"].startswith(f"python -m benchmarks.{name} --rounds 1")
    assert about["tables"]
    for table in about["tables"]:
        assert table["lines"] and all(len(line) == len(table["header"]) for line in table["lines"])
        assert table["title"] in ended.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
