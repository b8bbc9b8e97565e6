"""What `safeloader bench` makes of the lines of the process that trains a few steps."""

from __future__ import annotations

from typing import Any

import pytest

from safeloader.nnunet.bench import steps
from safeloader.nnunet.bench.measured import Network
from safeloader.nnunet.bench.network import NetworkNotMeasuredError, network_of

READY = {"ready": 1000.0, "device": "CPU", "gpu": False}


def step(step_s: float, *, counts: bool = True) -> dict[str, Any]:
    return {"step_s": step_s, "counts": counts}


def test_the_warm_up_does_not_count() -> None:
    lines = [READY, step(9.0, counts=False), step(0.5), step(0.3)]
    assert network_of(lines, 0, 1010.0, "") == Network(per_s=2.5, steps=2, device="CPU", gpu=False)


def test_one_that_was_ended_after_a_step() -> None:
    assert network_of([READY, step(40.0, counts=False)], -9, 1081.0, "").per_s == 1 / 40


def test_one_that_was_ended_before_its_first_step_did() -> None:
    found = network_of([READY], -9, 1080.0, "")
    assert found == Network(per_s=1 / 80, steps=0, device="CPU", gpu=False, at_most=True)


@pytest.mark.parametrize(
    ("lines", "exit_code", "errors", "words"),
    [
        ([READY], 1, "Traceback\nOutOfMemoryError: CUDA out of memory.\n", "step failed: OutOfMemoryError: CUDA out"),
        ([READY], -11, "", "step failed: no message"),
        ([], -9, "", "not ready within 300 s"),
        ([READY], -9, "", "killed after 5 s: perhaps memory"),
    ],
)
def test_no_number(lines: list[dict[str, Any]], exit_code: int, errors: str, words: str) -> None:
    with pytest.raises(NetworkNotMeasuredError, match=words):
        network_of(lines, exit_code, 1005.0, errors)


class Clock:
    """The time of `steps`, in which nothing but a step takes any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps_s: float) -> None:
        self.now, self.said, self.left = 0.0, [], list(steps_s)  # type: ignore[var-annotated]
        monkeypatch.setattr(steps.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(steps, "_say", lambda **line: self.said.append(line))

    def step(self) -> None:
        self.now += self.left.pop(0)


def test_steps_are_taken_until_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 7.0, 2.0, 2.0, 2.0, 2.0)
    steps.train(clock.step, 1, 5.0)
    assert [line["counts"] for line in clock.said] == [False, True, True, True]


def test_a_first_step_that_takes_all_the_time_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 21.0)
    steps.train(clock.step, 1, 20.0)
    assert clock.said == [{"step_s": 21.0, "counts": True}]
