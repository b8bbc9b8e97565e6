"""Every step of the protocol is a place to die at, and nobody notices.

The list of places is made from the messages of `pool.wire` and the steps of `killpoints`; tests check that the list
is complete, and each place is really reached (or its test fails, because nobody died).
"""

from __future__ import annotations

import ast
import inspect
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import safeloader
from safeloader import killpoints
from safeloader.pool import launch, nursery, wire, worker
from safeloader.testing import wait_until
from tests.process import kill_scenarios
from tests.process.kill_scenarios import SCENARIOS
from tests.processes import lives

POINTS = list(killpoints.STEPS) + [
    f"{role}.{moment}.{message.__name__}"
    for message, (sender, receiver) in wire.ROUTES.items()
    for role, moment in ((sender, "sending"), (sender, "sent"), (receiver, "received"))
]

_SCENARIO_OF = {
    "Load": "clean",
    "Loaded": "clean",
    "nursery.step.loading": "clean",
    "trainer.step.spawned": "clean",
    "Unload": "two_pools",
    "Kill": "two_pools",
    "Failed": "raises",
    "StartFailed": "raises_at_start",
    "LoadFailed": "falls_back",
    "ForkFailed": "fork_fails",
    "Avoid": "quarantined",
    "Retire": "recycled",
    "worker.step.keeping": "finite",
    "worker.step.kept": "finite",
}
"""Points that the plain stream does not pass."""

_LAST_WORDS = {"worker.sent.Failed", "worker.sent.StartFailed"}
"""After these the trainer ends the pool, so the worker dies here either of us or of that."""

_EFFECTS = {"os.fork", "os.waitpid", "subprocess.Popen", "unpack", "next", "seed_everything", "transform", "encode"}
"""Calls that change something outside the function: who makes one must be able to die around it."""


_FORKS_CAN_FAIL = os.access(kill_scenarios.PIDS_CGROUPS, os.W_OK)


def _scenario(point: str) -> str:
    return _SCENARIO_OF.get(point) or _SCENARIO_OF.get(point.rpartition(".")[2]) or "stream"


def _points(role: str) -> list[Any]:
    """The points of a role; those that nobody can reach here are skipped, and say so."""
    skip = pytest.mark.skip(reason="needs a pids cgroup (v1) that this user may create, to let a fork fail")
    possible = [_FORKS_CAN_FAIL or _scenario(point) != "fork_fails" for point in POINTS]
    return [
        pytest.param(point, marks=() if can else skip)
        for point, can in zip(POINTS, possible, strict=True)
        if point.startswith(role)
    ]


def _source_trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in Path(safeloader.__file__).parent.rglob("*.py"):
        yield path, ast.parse(path.read_text())


def test_every_message_has_a_route() -> None:
    messages = {kind for kind in vars(wire).values() if inspect.isclass(kind) and issubclass(kind, wire.Message)}
    assert set(wire.ROUTES) == messages - {wire.Message}


def test_every_step_is_reached_in_one_place_and_no_other_is() -> None:
    reached = Counter(
        call.args[0].value
        for path, tree in _source_trees()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("killpoints.reach")
        if isinstance(call.args[0], ast.Constant)
    )
    assert reached == Counter(killpoints.STEPS)


@pytest.mark.parametrize("module", [worker, nursery, launch], ids=lambda module: module.__name__)
def test_every_effect_has_a_point_beside_it(module: object) -> None:
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            calls = [ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)]
            effects = [c for c in calls if c in _EFFECTS or c.rpartition(".")[2] in _EFFECTS]
            beside = [c for c in calls if c.endswith(("killpoints.reach", "hannel.send", "hannel.receive"))]
            asks_only = function.name in ("poll", "serve")  # reads a status; warms up before anything is promised
            assert not effects or beside or asks_only, f"{function.name} has no kill point around {effects}"


def test_points_that_need_a_scenario_of_their_own_exist() -> None:
    assert {_scenario(point) for point in POINTS} == set(SCENARIOS)
    assert set(_SCENARIO_OF) <= set(POINTS) | {kind.__name__ for kind in wire.ROUTES}


# ---- workers and nurseries: the stream does not change ----


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[object]]:
    seen = {name: scenario() for name, scenario in SCENARIOS.items() if name != "fork_fails" or _FORKS_CAN_FAIL}
    assert seen["stream"][5][2] == kill_scenarios.SIXTH_DRAW  # type: ignore[index]
    assert seen["raises"] == [*seen["stream"][:5], "WorkerError"]
    assert seen["raises_at_start"] == ["StartError"]
    return seen


@pytest.mark.parametrize("point", _points("nursery") + _points("worker"))
def test_a_death_at_this_point_changes_nothing(
    point: str, undisturbed: dict[str, list[object]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "reached"
    monkeypatch.setattr(killpoints, "_armed", killpoints._Armed(point, mark=str(mark)))  # for what is forked from here
    monkeypatch.setenv(killpoints.ENV, point)  # for what is spawned
    monkeypatch.setenv(killpoints.MARK_ENV, str(mark))
    assert SCENARIOS[_scenario(point)]() == undisturbed[_scenario(point)]
    if point not in _LAST_WORDS:
        wait_until(mark.exists, what=f"a death at {point}")


# ---- the trainer: nothing is left, and its next run sees the same ----


@pytest.mark.parametrize("point", _points("trainer"))
def test_a_trainer_that_dies_at_this_point_leaves_nothing(point: str) -> None:
    trainer = os.fork()  # spares each trainer the import of torch
    if trainer == 0:
        try:
            os.setpgid(0, 0)
            killpoints._armed = killpoints._Armed(point)  # type: ignore[misc]
            SCENARIOS[_scenario(point)]()
        finally:
            os._exit(0)
    _, status = os.waitpid(trainer, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the point was not reached"
    wait_until(lambda: not _group(trainer), timeout_s=2, what="the end of all processes of the trainer's group")
    for cgroup in kill_scenarios.PIDS_CGROUPS.glob(f"safeloader-test-{trainer}-*"):
        cgroup.rmdir()


def test_runs_in_processes_of_their_own_see_the_same() -> None:
    command = [sys.executable, "-m", "tests.process.kill_scenarios", "stream"]
    first, second = (subprocess.run(command, capture_output=True, timeout=120, check=True) for _ in range(2))
    assert first.stdout == second.stdout != b""


def _group(leader: int) -> list[int]:
    """The living processes of a process group."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == leader and lives(process)
        except ProcessLookupError:
            return False

    return [process.pid for process in psutil.process_iter() if belongs(process)]
