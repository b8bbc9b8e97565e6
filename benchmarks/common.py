"""What all benchmarks share: a fresh process for each measurement, and results with the machine they belong to."""

from __future__ import annotations

import csv
import json
import multiprocessing
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch


def in_a_fresh_process(benchmark: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m benchmarks.BENCHMARK ARGUMENTS`, whose last line is JSON; returns that."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": multiprocessing.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit.stdout.strip() or None,
    }


def write(folder: Path, name: str, rows: Sequence[Any], more: Mapping[str, Any]) -> None:
    """Write `name.csv` with the rows (dataclasses, at least one) and `name.json` with the machine and what else."""
    folder.mkdir(parents=True, exist_ok=True)
    table = [asdict(row) for row in rows]
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    (folder / f"{name}.json").write_text(json.dumps({**machine(), **more}, indent=2) + "\n")
