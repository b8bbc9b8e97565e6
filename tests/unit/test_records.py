"""What a person reads when something has died."""

from __future__ import annotations

import time
from typing import Any

import pytest

from safeloader.errors import BadCaseError, OutageError, QuarantineLimitError, RestartLimitError, SafeLoaderError
from safeloader.faults.exits import ProcessExit
from safeloader.faults.incident import Incident
from safeloader.pool import events, records
from safeloader.pool.events import Cause, Why
from safeloader.ring.status_page import Stage, Status

KILLED = ProcessExit(signal="SIGKILL")


def _death(end: dict[str, Any] | None = None, **mourn: Any) -> Incident:
    death = events.Mourn(
        **{"worker": 1, "incarnation": 0, "tickets": (7, 9), "restart_in_s": 0.0, "cause": Cause.OUTSIDE, **mourn}
    )
    status = Status(Stage.LOADING, 7, ("brain_1",), time.monotonic(), 3)
    return records.worker_death(
        "train", death, records.End(**{"pid": 12, "how": KILLED, "status": status, **(end or {})})
    )


def test_a_death_says_who_how_where_and_what_was_done() -> None:
    incident = _death()
    assert incident.message.startswith(
        "worker train-1 (pid 12) was killed by SIGKILL while loading the batch of ticket 7 (case brain_1) for 0.0 s: "
        "replaced at once, tickets 7, 9 made again. SIGKILL: something outside this program sent it"
    )
    assert (incident.signal, incident.stage, incident.ticket, incident.case) == ("SIGKILL", "loading", 7, "brain_1")


@pytest.mark.parametrize(
    ("restart_in_s", "tickets", "words"),
    [
        (1.25, (), ": replaced in 1.2 s. "),
        (0.0, (7,), ": replaced at once, ticket 7 made again. "),
        (None, (), ": not replaced. "),
    ],
)
def test_what_was_done_is_said_as_it_is(restart_in_s: float | None, tickets: tuple[int, ...], words: str) -> None:
    assert words in _death(restart_in_s=restart_in_s, tickets=tickets).message


def test_a_batch_that_had_been_handed_over_is_not_blamed() -> None:
    incident = _death(tickets=(9, 10))
    assert (incident.stage, incident.ticket, incident.case) == ("idle", None, None)
    assert "while idle" in incident.message


STACKS = """\
Thread 0x1 (most recent call first):
  File "/opt/lib/nnunet_dataset.py", line 312 in load_case
  File "/opt/lib/data_loader.py", line 160 in generate_train_batch"""


def test_a_hang_says_how_long_where_and_in_which_state() -> None:
    incident = _death(
        {"idle_s": 120.04, "allowed_s": 120.0, "state": "it was stopped by a signal (SIGSTOP)", "stacks": STACKS},
        cause=Cause.HUNG,
    )
    assert incident.kind == "worker-hang"
    assert incident.message.startswith(
        "worker train-1 (pid 12) made no progress for 120.0 s (allowed: 120.0 s, it was stopped by a signal (SIGSTOP), "
        "in load_case (nnunet_dataset.py:312)) and was killed while loading the batch of ticket 7 (case brain_1) for "
    )
    assert "raise hang_timeout_s (SAFELOADER_HANG_TIMEOUT_S)" in incident.advice
    assert incident.stacks == STACKS


def test_what_cannot_be_killed_is_said() -> None:
    incident = _death({"idle_s": 9.0, "allowed_s": 9.0, "abandoned": True}, cause=Cause.HUNG)
    assert "(allowed: 9.0 s) and can't be killed and is abandoned while loading" in incident.message


def test_an_oom_kill_needs_evidence() -> None:
    rose = "the OOM-kill counter of its cgroup (/x) rose from 0 to 1"
    killed = _death({"oom": rose, "oom_known": True}, cause=Cause.MEMORY)
    assert f"was killed by the kernel's OOM killer ({rose}) while loading" in killed.message
    assert "the kernel's OOM-kill counters did not rise" in _death({"oom_known": True}).message
    assert "the kernel when memory runs out, a scheduler or a person" in _death({"oom_known": False}).message


def test_who_rests_because_the_cpus_are_busy() -> None:
    assert records.resting("train", events.Rest(9, 12, at_work=3), 20.0) == (
        "pool 'train': 9 of 12 workers rest, since 3 at work keep the CPUs busy, and the others had nothing to do for "
        "20 s (rest_after_s); they are started again when they are needed"
    )


def test_giving_up_lists_the_causes_most_frequent_first() -> None:
    refused = {"how": ProcessExit(), "words": "could not be forked: [Errno 11] Resource temporarily unavailable"}
    incidents = [
        _death(refused, cause=Cause.REFUSED),
        _death(),
        _death(),
        _death({"how": ProcessExit(code=3)}, cause=Cause.ITSELF),
        _death({"idle_s": 1.0}, cause=Cause.HUNG),
    ]
    error = records.given_up("train", events.GiveUp(Why.DEATHS, 5), incidents)
    assert isinstance(error, RestartLimitError)
    assert str(error).startswith(
        "pool 'train' is given up: 5 workers died without making a batch, with fewer workers and with each way to "
        "start them that there is: 2 x SIGKILL while loading; 1 x could not be forked: [Errno 11] Resource temporarily "
        "unavailable while loading; 1 x exit code 3 while loading; 1 x hang while loading. Last: worker train-1"
    )
    assert error.incidents == tuple(incidents)


@pytest.mark.parametrize(
    ("why", "kind", "words"),
    [
        (Why.BAD_CASE, BadCaseError, "case brain_1 of pool 'train' has two strikes (on_bad_case='raise')"),
        (
            Why.QUARANTINE,
            QuarantineLimitError,
            "case brain_1 of pool 'train' has two strikes, and no more cases may be",
        ),
        (
            Why.OUTAGE,
            OutageError,
            "pool 'train' is given up: its data could not be read for longer than outage_timeout_s",
        ),
    ],
)
def test_each_end_has_an_error_of_its_own(why: Why, kind: type[SafeLoaderError], words: str) -> None:
    error = records.given_up("train", events.GiveUp(why, case="brain_1"), [_death()])
    assert type(error) is kind
    assert str(error).startswith(words)
    assert "Last: worker train-1 (pid 12) was killed by SIGKILL" in str(error)
