"""A stream can be left anywhere and taken up again, by any number of workers, whatever dies."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeloader import SafeAugmenter
from safeloader.errors import ConfigError
from safeloader.testing import Killer
from tests.loaders import RandomLoader, fingerprint

pytestmark = pytest.mark.usefixtures("warm_nursery")

SEED = 7
LENGTH = 40


@pytest.fixture(scope="module")
def undisturbed(warm_nursery: None) -> list[object]:
    return [fingerprint(batch) for batch in itertools.islice(_augmenter(1, 2, seed=SEED), LENGTH)]


def _augmenter(workers: int, cached: int, **options: Any) -> SafeAugmenter:
    return SafeAugmenter(RandomLoader((1, 1, 4, 4)), None, workers, cached, backoff_first_s=0.0, **options)


@settings(
    max_examples=int(os.environ.get("SAFELOADER_EXAMPLES", "15")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 15), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["clean", "forked"])),
        min_size=1,
        max_size=5,
    ),
    kills=st.sets(st.integers(0, LENGTH), max_size=5),
    chance=st.integers(0, 1000),
)
def test_the_parts_are_the_whole(
    parts: Sequence[tuple[int, int, int, str]], kills: set[int], chance: int, undisturbed: list[object]
) -> None:
    """(how many batches, by how many workers, with how many cached, how started) for each part."""
    state, seen = {"version": 1, "seed": SEED, "stream": 0, "next_ticket": 0, "quarantined": []}, []
    for batches, workers, cached, method in parts:
        with _augmenter(workers, cached, start_method=method) as augmenter:
            augmenter.load_state_dict(json.loads(json.dumps(state)))
            killer = Killer(augmenter, seed=chance)
            for _ in range(min(batches, LENGTH - len(seen))):
                if len(seen) in kills:
                    killer.strike()
                seen.append(fingerprint(next(augmenter)))
            state = augmenter.state_dict()
    assert seen == undisturbed[: len(seen)]
    assert state["next_ticket"] == len(seen)


def test_a_running_augmenter_can_be_sent_anywhere(undisturbed: list[object]) -> None:
    with _augmenter(2, 2, seed=SEED) as augmenter:
        states = []
        for batch in undisturbed[:10]:
            states.append(augmenter.state_dict())
            assert fingerprint(next(augmenter)) == batch
        augmenter.load_state_dict(states[3])
        assert [fingerprint(next(augmenter)) for _ in range(10)] == undisturbed[3:13]
        augmenter.load_state_dict({**states[0], "next_ticket": 30})
        assert fingerprint(next(augmenter)) == undisturbed[30]
        augmenter.restart()
        assert fingerprint(next(augmenter)) == undisturbed[31], "a restart goes on from there"


def test_what_is_ready_but_not_delivered_is_still_to_come(undisturbed: list[object]) -> None:
    with _augmenter(2, 4, seed=SEED) as augmenter:
        next(augmenter)
        state = augmenter.state_dict()
    assert state == {"version": 1, "seed": SEED, "stream": 0, "next_ticket": 1, "quarantined": []}
    assert len(json.dumps(state)) < 1024


def test_in_another_process_as_well(undisturbed: list[object]) -> None:
    script = (
        "from tests.process.test_state import _augmenter, fingerprint\n"
        "with _augmenter(2, 2) as augmenter:\n"
        f"    augmenter.load_state_dict({{'version': 1, 'seed': {SEED}, 'stream': 0, 'next_ticket': 17, "
        "'quarantined': []})\n"
        "    print(fingerprint(next(augmenter)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == str(undisturbed[17])


def test_quarantined_cases_go_along() -> None:
    with _augmenter(1, 1) as augmenter:
        augmenter.load_state_dict({"version": 1, "seed": 1, "stream": 0, "next_ticket": 0, "quarantined": ["case_001"]})
        next(augmenter)
        assert augmenter.report().quarantined == ("case_001",)
        assert augmenter.state_dict()["quarantined"] == ["case_001"]


GOOD = {"version": 1, "seed": 1, "stream": 0, "next_ticket": 0, "quarantined": []}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "this is no state of a SafeAugmenter: 'version' is missing"),
        ({**GOOD, "version": 2}, "the state is of version 2; this is version 1"),
        ({**GOOD, "stream": 3}, "the state is of stream 3, and this augmenter makes stream 0: give it stream=3"),
        ({**GOOD, "next_ticket": -1}, "this is no state of a SafeAugmenter: "),
        ({**GOOD, "quarantined": "case_001"}, "this is no state of a SafeAugmenter: "),
    ],
)
def test_what_is_no_state_is_refused_in_one_line(state: dict[str, Any], message: str) -> None:
    with _augmenter(1, 1, seed=2) as augmenter:
        with pytest.raises(ConfigError) as caught:
            augmenter.load_state_dict(state)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert augmenter.seed == 2, "nothing has changed"
