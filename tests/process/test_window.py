"""The window that `safeloader top` looks through: what is seen, by whom, and that a look disturbs no training."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import safeloader
from safeloader import SafeAugmenter
from safeloader.report.window import Window, WindowError, look, process_of, windows
from safeloader.testing import wait_until
from tests.loaders import RandomLoader

pytestmark = pytest.mark.usefixtures("warm_nursery")

PACKAGE = str(Path(safeloader.__file__).parents[1])


def own() -> list[str]:
    return [name for name in windows() if process_of(name) == os.getpid()]


def test_what_is_seen() -> None:
    with SafeAugmenter(RandomLoader(), None, 2, 1, name="seen", seed=5) as augmenter:
        for _ in range(3):
            next(augmenter)
        wait_until(lambda: look(own()[0], 5)["pools"][-1]["slots"]["ready"] == 4)
        state = look(own()[0], 5)
        pool = state["pools"][-1]
        assert state["pid"] == os.getpid()
        assert (pool["name"], pool["batches"], pool["next_ticket"], pool["seed"]) == ("seen", 3, 3, 5)
        assert pool["slots"] == augmenter.report().slots
        assert [worker["pid"] for worker in pool["workers"]] == [worker.pid for worker in augmenter.workers()]
        assert pool["waits_for"] is None and pool["incidents"] == []

        os.kill(pool["workers"][1]["pid"], signal.SIGKILL)
        wait_until(lambda: look(own()[0], 5)["pools"][-1]["restarts"] == 1)
        pool = look(own()[0], 5)["pools"][-1]
        assert pool["incidents"][0]["kind"] == "worker-death"
        assert (
            f"(pid {state['pools'][-1]['workers'][1]['pid']}) was killed by SIGKILL" in pool["incidents"][0]["message"]
        )
    assert [pool["name"] for pool in look(own()[0], 5)["pools"]] == []


def test_a_viewer_that_does_not_read_disturbs_nobody() -> None:
    with SafeAugmenter(RandomLoader(), None, 1, 1) as augmenter, socket.socket(socket.AF_UNIX) as viewer:
        viewer.connect(f"\0{own()[0]}")
        for _ in range(20):
            next(augmenter)
        with socket.socket(socket.AF_UNIX) as in_a_hurry:
            in_a_hurry.connect(f"\0{own()[0]}")  # gone before it is answered
        assert look(own()[0], 5)["pools"][-1]["batches"] == 20


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user_sees_nothing() -> None:
    with SafeAugmenter(RandomLoader(), None, 1, 1) as augmenter:
        next(augmenter)
        name = own()[0]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgroups([])
                os.setuid(65534)
                look(name, 5)
            except WindowError as error:
                code = 0 if str(error) == "it is another user's" else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert look(name, 5)["pools"][-1]["batches"] == 1


def test_a_forked_child_keeps_no_window_open() -> None:
    program = """
import os, signal, sys
from safeloader import SafeAugmenter
from tests.loaders import RandomLoader
augmenter = SafeAugmenter(RandomLoader(), None, 1, 1, start_method="forked")
next(augmenter)
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
sys.stdin.read()
"""
    path = os.pathsep.join([PACKAGE, str(Path(__file__).parents[2])])
    trainer = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdin is not None and trainer.stdout is not None
    child = int(trainer.stdout.readline())
    try:
        assert [process_of(name) for name in windows()].count(trainer.pid) == 1
        trainer.kill()
        trainer.wait()
        wait_until(lambda: trainer.pid not in [process_of(name) for name in windows()], timeout_s=5)
        os.kill(child, 0)  # it lives, and its copy of the descriptor is closed
    finally:
        os.kill(child, signal.SIGKILL)
        trainer.kill()
        trainer.wait()
        trainer.stdin.close()
        trainer.stdout.close()


def test_a_process_that_is_stopped_does_not_answer() -> None:
    program = (
        "import sys; from safeloader.report.window import Window; "
        "window = Window(dict); print(flush=True); sys.stdin.read()"
    )
    stopped = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": PACKAGE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert stopped.stdin is not None and stopped.stdout is not None
    with stopped, stopped.stdin, stopped.stdout:
        stopped.stdout.readline()
        name = next(name for name in windows() if process_of(name) == stopped.pid)
        with pytest.raises(WindowError, match=r"^it does not answer within 0\.2 s$"):
            look(name, 0.2)
        stopped.kill()
    with pytest.raises(WindowError, match=r"^it is gone \(Connection refused\)$"):
        look(name, 0.2)


def test_an_answer_that_is_too_long() -> None:
    before = own()
    window = Window(lambda: {"pools": "x" * (1 << 24)})
    (name,) = set(own()) - set(before)
    with ThreadPoolExecutor(1) as viewers:
        seen = viewers.submit(look, name, 5)
        select.select([window.fd], [], [], 5)
        window.answer()
        with pytest.raises(WindowError, match=r"^its answer was cut off, or is of another version of SafeLoader$"):
            seen.result()
    window.close()


def test_where_windows_can_not_be_listed(tmp_path: Path) -> None:
    with pytest.raises(WindowError, match=r"^/proc/net/unix can't be read: No such file or directory$"):
        windows(tmp_path)
