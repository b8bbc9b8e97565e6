"""Ctrl-C and `kill` in the middle of the demo: one line, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import safeloader
from safeloader.cli.command import signals_interrupt
from safeloader.testing import wait_until
from tests.processes import lives


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_other_signals_do_what_ctrl_c_does(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), signals_interrupt():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    package = str(Path(safeloader.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
    demo = subprocess.Popen(
        [sys.executable, "-m", "safeloader", "demo", "--folder", str(tmp_path)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "logs" / "plan_and_preprocess.log"
    # By then nnU-Net has started worker processes of its own.
    wait_until(lambda: log.exists() and "Fingerprint extraction" in log.read_text(), timeout_s=90)
    family = psutil.Process(demo.pid).children(recursive=True)
    assert family
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert output.splitlines()[-1] == "safeloader demo: interrupted"
    assert "Traceback" not in output
    wait_until(lambda: not any(map(lives, family)))
