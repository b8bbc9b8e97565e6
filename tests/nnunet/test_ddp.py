"""Two ranks of nnU-Net's trainer, with workers killed and stopped in one of them: see `ddp.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safeloader.nnunet.workspace import Workspace
from tests.nnunet import ddp


@pytest.fixture(scope="module")
def ranks(make_workspace: Callable[..., Workspace], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    workspace, folder = make_workspace(), tmp_path_factory.mktemp("ddp")
    own = {
        "nnUNet_n_proc_DA": "2",
        "SAFELOADER_SEED": "3",
        # So that the stopped worker is found within the test. Its first batch has 300 s otherwise, its others 120.
        "SAFELOADER_HANG_TIMEOUT_S": str(ddp.HANG_S),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.nnunet.ddp", str(workspace.preprocessed / workspace.dataset), str(folder)],
        env=workspace.environment(own),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ddp.RANKS)]


def test_every_rank_takes_every_step(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["seen"]) == ddp.EPOCHS * ddp.ITERATIONS
        assert rank["validated"] == ddp.EPOCHS * ddp.VAL_ITERATIONS


def test_only_one_ranks_workers_were_struck_and_all_were_replaced(ranks: list[dict[str, Any]]) -> None:
    undisturbed, disturbed = ranks
    assert disturbed["struck"] == [number.name for number in ddp.STRIKES.values()]
    assert disturbed["restarts"] >= len(ddp.STRIKES)
    assert undisturbed["struck"] == [] and undisturbed["restarts"] == 0


def test_the_ranks_streams_differ(ranks: list[dict[str, Any]]) -> None:
    assert [rank["streams"] for rank in ranks] == [[0, 1], [2, 3]]
    assert len({rank["seed"] for rank in ranks}) == 1
    assert len({batch for rank in ranks for batch in rank["seen"]}) == ddp.RANKS * ddp.EPOCHS * ddp.ITERATIONS


def test_the_ranks_have_the_same_weights(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["weights"] and ranks[0]["weights"] == ranks[1]["weights"]


def test_a_hang_is_found_before_the_other_ranks_give_up(ranks: list[dict[str, Any]]) -> None:
    assert [rank["hang_most_s"] for rank in ranks] == [240.0, 240.0]
