"""The text file for Prometheus."""

from __future__ import annotations

import re

from safeloader.report.prometheus import text

COUNTS = {
    "batches": 251,
    "wait_s": 3.25,
    "restarts": 2,
    "quarantined": 1,
    "workers_nbytes": 1 << 30,
    "incidents": {"worker-death": 2, "quarantine": 1},
}


def test_the_file() -> None:
    lines = text(
        'Dataset777/my "best"\\x/fold_0', 7, 1_764_000_000.5, {"train": COUNTS, "val": {**COUNTS, "incidents": {}}}
    )
    samples = [line for line in lines.splitlines() if not line.startswith("#")]
    label = r'training="Dataset777/my \"best\"\\x/fold_0"'
    assert samples[:4] == [
        f"safeloader_epoch{{{label}}} 7",
        f"safeloader_epoch_end_timestamp_seconds{{{label}}} 1764000000.500",
        f'safeloader_batches_total{{{label},loader="train"}} 251',
        f'safeloader_batches_total{{{label},loader="val"}} 251',
    ]
    assert samples[-2:] == [
        f'safeloader_incidents_total{{{label},loader="train",kind="worker-death"}} 2',
        f'safeloader_incidents_total{{{label},loader="train",kind="quarantine"}} 1',
    ]
    assert lines.endswith("\n")


def test_each_metric_has_its_head_once_and_before_its_samples() -> None:
    seen: list[str] = []
    for line in text("t", 0, 0.0, {"train": COUNTS, "val": COUNTS}).splitlines():
        name = re.split(r"[ {]", line.removeprefix("# HELP ").removeprefix("# TYPE "))[0]
        if line.startswith("# HELP"):
            assert name not in seen
            seen.append(name)
        assert seen[-1] == name
