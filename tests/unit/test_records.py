"""What a person reads when something has died."""

from __future__ import annotations

import time
from typing import Any

import pytest

from safeloader.errors import RestartLimitError
from safeloader.faults.exits import ProcessExit
from safeloader.faults.incident import Incident
from safeloader.pool import events, records
from safeloader.pool.machine import Limits
from safeloader.ring.status_page import Stage, Status

LIMITS = Limits(2, 2, max_restarts=3, window_s=600, backoff_first_s=0.1, backoff_max_s=5)
KILLED = ProcessExit(signal="SIGKILL")


def _death(how: ProcessExit = KILLED, cause: str | None = None, **mourn: Any) -> Incident:
    death = events.Mourn(**{"worker": 1, "incarnation": 0, "tickets": (7, 9), "restart_in_s": 0.0, **mourn})
    status = Status(Stage.LOADING, 7, "brain_1", time.monotonic(), 3)
    return records.worker_death("train", death, pid=12, how=how, cause=cause, status=status)


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


def test_giving_up_lists_the_causes_most_frequent_first() -> None:
    refused = "could not be forked: [Errno 11] Resource temporarily unavailable"
    incidents = [_death(ProcessExit(), refused), _death(), _death(), _death(ProcessExit(code=3))]
    error = records.given_up("train", LIMITS, events.GiveUp(4, failed_starts=False), incidents)
    assert isinstance(error, RestartLimitError)
    assert str(error).startswith(
        "pool 'train' is given up: 4 workers died in 600 s with no batch in between (max_restarts=3): "
        f"2 x SIGKILL while loading; 1 x {refused} while loading; 1 x exit code 3 while loading. Last: worker train-1"
    )
    assert error.incidents == tuple(incidents)
