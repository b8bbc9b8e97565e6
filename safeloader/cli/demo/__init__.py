"""`safeloader demo`: stock nnU-Net dies of one killed worker, and SafeLoader does not.

    __init__.py    the command and its options
    play.py        the order of things
    processes.py   nnU-Net's commands, of which nothing is left running
    killing.py     who is killed, when
    training.py    one training, watched and measured
    recording.py   events.csv and results.json
    picture.py     the picture, drawn from events.csv
    screen.py      what is shown

What the demo needs beyond SafeLoader (the extra `demo`) is imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Final

from safeloader.cli.command import Command, signals_interrupt
from safeloader.errors import ConfigError

_NEEDS: Final = ("nnunetv2", "nilearn", "matplotlib", "rich")
MARKER: Final = ".safeloader-demo"
"""The file that tells a demo's folder from any other."""


class Demo(Command):
    """See stock nnU-Net training die of one killed worker, and SafeLoader survive dozens.

    Makes a small dataset of nilearn's MNI152 brain (T1; grey and white matter), plans and preprocesses it with
    nnU-Net's own commands, and trains it twice with nnUNetv2_train: with the stock trainer, of which one worker is
    killed, and with SafeLoader, of which a worker is killed every few seconds by SIGKILL, SIGSEGV and SIGBUS in turn.
    Ends with a table, and a picture of both trainings.

    To be quick without a GPU, both train a short schedule and a small network: a configuration of the demo's own
    that inherits from 3d_fullres. Everything is written into one folder; 3 to 5 minutes on 2 cores.
    """

    name = "demo"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--folder",
            type=Path,
            default=Path("safeloader-demo"),
            help="where everything goes; a folder of an earlier demo keeps its dataset (default: %(default)s)",
        )
        parser.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
        )
        parser.add_argument(
            "--kill-every",
            type=float,
            default=4.0,
            metavar="SECONDS",
            help="time between two kills with SafeLoader (default: %(default)g, at least 0.5)",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the demo; 0 if SafeLoader's training finished without losing a batch."""
        _check(arguments)
        from safeloader.cli.demo.play import play

        with signals_interrupt():
            return play(arguments.folder.resolve(), device=arguments.device, kill_every_s=arguments.kill_every)


def _check(arguments: argparse.Namespace) -> None:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"needs {', '.join(missing)}: pip install 'safeloader[demo]'")
    if not arguments.kill_every >= 0.5:
        raise ConfigError(f"--kill-every {arguments.kill_every:g}: at least 0.5 s")
    folder: Path = arguments.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--folder {folder} is a file")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"--folder {folder} has other files in it; name a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--folder {folder} can't be made ({error.strerror}); name one where you may write"
        ) from error
