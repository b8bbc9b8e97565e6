"""`safeloader top`: what the pools of running trainings are doing, live.

sight.py   finds the trainings of this machine, and looks at them      page.py   what a person sees
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Final

from safeloader.cli.command import Command, show
from safeloader.cli.top.page import page
from safeloader.cli.top.sight import Sight, look_at_all
from safeloader.errors import ConfigError, SafeLoaderError
from safeloader.report.window import WindowError

_ONCE_S: Final = 1.0
"""Two looks so far apart tell how many batches are made in a second."""
_CLEAR: Final = "\x1b[H\x1b[2J"


class Top(Command):
    """See what running trainings are doing: their pools, and each worker.

    For each pool: batches per second, how full its ring is, what part of the time training waited, restarts and
    quarantined cases; for each worker its stage, case, for how long, memory and batches; the latest incidents. Shows
    all trainings with SafeLoader of this user on this machine (in a container: in this container), or those with the
    given pids. Looking costs a training about a millisecond of its supervisor's time, and nothing while nobody looks.

    Exit codes: 0 at least one training was seen, 1 there is none, 2 wrong arguments.
    """

    name = "top"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("pids", metavar="PID", type=int, nargs="*", help="only the training with this process id")
        parser.add_argument("--once", action="store_true", help="look once (for 1 s), and end")
        parser.add_argument("--json", action="store_true", help="print JSON, one line per look")
        parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")

    def run(self, arguments: argparse.Namespace) -> int:
        """Look again and again until Ctrl-C; once, if that is asked for or nobody watches."""
        if not 0.1 <= arguments.every <= 3600:
            raise ConfigError(f"--every {arguments.every:g}: between 0.1 and 3600 s")
        once = arguments.once or not (sys.stdout.isatty() or arguments.json)
        interval_s = _ONCE_S if once else arguments.every
        before = _look(arguments.pids)
        while True:
            time.sleep(interval_s)
            now = _look(arguments.pids)
            _print(before, now, as_json=arguments.json, clear=not once)
            if once:
                return 0
            before = now


def _look(pids: Sequence[int]) -> list[Sight]:
    try:
        seen = look_at_all()
    except WindowError as error:
        raise SafeLoaderError(str(error)) from error
    if pids:
        seen = [sight for sight in seen if sight.pid in pids]
    if not seen:
        raise SafeLoaderError(
            f"no training with SafeLoader {'has the pid ' + ', '.join(map(str, pids)) if pids else 'runs here'}. It is "
            "seen from the same machine, or the same container, while its workers are there"
        )
    return seen


def _print(before: Sequence[Sight], now: Sequence[Sight], *, as_json: bool, clear: bool) -> None:
    earlier = {sight.name: sight for sight in before}
    if as_json:
        print(json.dumps([sight.as_json(earlier.get(sight.name)) for sight in now]), flush=True)
        return
    columns = shutil.get_terminal_size((120, 50)).columns
    lines = [line[: columns - 1] if clear else line for sight in now for line in page(sight, earlier.get(sight.name))]
    show((_CLEAR if clear else "") + "\n".join(lines))
