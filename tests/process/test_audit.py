"""Audits of real pools: the same whatever dies and however many workers there are; what differs is found and named."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safeloader import SafeAugmenter
from safeloader.cli import main
from safeloader.errors import WorkerError
from safeloader.report.audit import audit_file
from safeloader.ring.digest import checksum, parts
from safeloader.testing import DEADLY, Killer
from tests.loaders import RandomLoader, Saboteur, send_self

pytestmark = pytest.mark.usefixtures("warm_nursery")


class Telling(RandomLoader):
    """Its batch shows which worker made it."""

    def __next__(self) -> dict[str, Any]:
        return {**super().__next__(), "worker": np.full(3, self.thread_id)}


class Slow(Telling):
    """So that each worker makes some of the batches."""

    def __next__(self) -> dict[str, Any]:
        time.sleep(0.02)
        return super().__next__()


class Mixed(RandomLoader):
    """A batch of all kinds; the set's order differs from process to process."""

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        return {**batch, "large": torch.randn(40, 50).t(), "names": {f"n{i}" for i in range(20)}, "none": None}


class Failing(RandomLoader):
    """Its fourth random number or so ends in an exception, in every worker again."""

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        if batch["draw"] > 0.9:
            raise KeyError("label 7")
        return batch


def run(folder: Path, n: int = 40, workers: int = 1, *, loader: Any = None, kill: bool = False, **options: Any) -> Path:
    given = {"seed": 7, "name": "train", "audit": True, **options}
    with SafeAugmenter(loader or RandomLoader(), None, workers, 2, folder=str(folder), **given) as augmenter:
        killer = Killer(augmenter, seed=workers, signals=DEADLY)
        for _ in range(n):
            if kill:
                killer.maybe(every=10)
            next(augmenter)
        assert not kill or killer.kills
    return folder / audit_file(given["name"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_the_checksum_of_what_was_delivered(tmp_path: Path) -> None:
    with SafeAugmenter(Mixed(), None, 2, 1, seed=3, stream=4, folder=str(tmp_path), audit=True) as augmenter:
        batches = [next(augmenter) for _ in range(10)]
    header, *rest = lines(tmp_path / audit_file("loader"))
    assert (header["seed"], header["stream"], header["pool"], header["first_ticket"]) == (3, 4, "loader", 0)
    assert rest == [
        {
            "ticket": ticket,
            "cases": list(dict.fromkeys(batch["keys"])),
            "checksum": checksum(batch),
            "parts": parts(batch),
        }
        for ticket, batch in enumerate(batches)
    ]


@pytest.mark.parametrize(
    "other",
    [{"workers": 3}, {"workers": 2, "kill": True}, {"workers": 2, "start_method": "forked"}],
    ids=["more workers", "killed workers", "forked workers"],
)
def test_the_same_seed_gives_the_same_audit(
    other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run(tmp_path / "a", loader=Mixed())
    b = run(tmp_path / "b", loader=Mixed(), **other)
    assert lines(a)[1:] == lines(b)[1:]
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == "train: the same: 40 tickets, 0 to 39 (seed 7, stream 0).\n"


def test_another_seed_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", 5), run(tmp_path / "b", 5, seed=8)
    assert main(["audit", str(a), str(b)]) == 1
    said = capsys.readouterr().out.splitlines()
    streams = "train: these are different streams: A has seed 7, stream 0, B has seed 8, stream 0. "
    assert said[0].startswith(f"{streams}Their batches have to differ")
    assert said[1] == "train: ticket 0 is the first that differs; none before it is the same in both."


def test_a_loader_that_depends_on_the_workers_number_is_found_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = run(tmp_path / "a", 20, 1, loader=Telling()), run(tmp_path / "b", 20, 3, loader=Slow())
    first = next(i for i, (one, other) in enumerate(zip(lines(a)[1:], lines(b)[1:], strict=True)) if one != other)
    assert main(["audit", str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"train: ticket {first} is the first that differs; ")
    assert "other content: worker differs, data, seg, draw, keys are the same\n" in said
    assert "the worker's number (thread_id)" in said


def test_restarts_and_continued_runs_append(tmp_path: Path) -> None:
    with SafeAugmenter(RandomLoader(), None, 1, 1, seed=7, folder=str(tmp_path), audit=True) as augmenter:
        for restart in (False, True):
            if restart:
                augmenter.restart()
            for _ in range(3):
                next(augmenter)
    run(tmp_path, 2, name="loader")
    records = lines(tmp_path / audit_file("loader"))
    assert [record.get("ticket", f"from {record.get('first_ticket')}") for record in records] == [
        "from 0", 0, 1, 2, "from 3", 3, 4, 5, "from 0", 0, 1
    ]  # fmt: skip
    assert records[1:3] == records[-2:]


def test_a_ticket_that_ends_in_an_exception_has_no_line(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="label 7") as raised:
        run(tmp_path, 1000, 2, loader=Failing(), name="loader")
    assert [line["ticket"] for line in lines(tmp_path / audit_file("loader"))[1:]] == list(range(raised.value.ticket))


@pytest.mark.parametrize("stage", ["loading", "encoding"])
def test_a_batch_that_is_made_again_has_one_line(stage: str, tmp_path: Path) -> None:
    saboteur = Saboteur(SendKill(), stage, tmp_path / "marker")
    with SafeAugmenter(
        saboteur, Saboteur.transform, 1, 1, seed=7, folder=str(tmp_path), audit=True, on_bad_case="retry"
    ) as augmenter:
        for _ in range(6):
            next(augmenter)
        assert augmenter.report().restarts == 1
    assert [line["ticket"] for line in lines(tmp_path / audit_file("loader"))[1:]] == list(range(6))


class SendKill:
    def __call__(self) -> None:
        send_self(signal.SIGKILL)


def test_without_an_audit_nothing_is_summed_up_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(batch: Any) -> None:
        raise AssertionError("a checksum was asked for")

    monkeypatch.setattr("safeloader.pool.worker.digest", never)
    with SafeAugmenter(
        RandomLoader(), None, 1, 1, folder=str(tmp_path), start_method="forked", name="off"
    ) as augmenter:
        next(augmenter)
    assert os.listdir(tmp_path) == []
    with (
        SafeAugmenter(
            RandomLoader(), None, 1, 1, folder=str(tmp_path), start_method="forked", name="on", audit=True
        ) as augmenter,
        pytest.raises(WorkerError, match="a checksum was asked for"),
    ):
        next(augmenter)


def test_training_does_not_wait_for_storage_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "not" / "mounted", 30)
    assert "the record of a delivered batch can't be written to" in caplog.text


def test_training_does_not_wait_for_storage_that_stalls(tmp_path: Path) -> None:
    path = tmp_path / audit_file("train")
    os.mkfifo(path)  # opening it to write blocks until somebody reads
    run(tmp_path, 30)
    reading = os.open(path, os.O_RDONLY)
    holding = os.open(path, os.O_WRONLY)  # so that reading does not end between two lines
    said = b""
    while said.count(b"\n") < 31:
        said += os.read(reading, 1 << 16)
    os.close(reading)
    os.close(holding)
    assert [json.loads(line).get("ticket") for line in said.splitlines()] == [None, *range(30)]
