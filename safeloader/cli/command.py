"""What a command of `safeloader` is."""

from __future__ import annotations

import argparse
import inspect
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class Command(ABC):
    """One command; the first line of a subclass's docstring is its summary, all of it is its help.

    Attributes:
        name: What the user types after `safeloader`.
    """

    name: ClassVar[str]

    @classmethod
    def description(cls) -> str:
        """The docstring as help text."""
        return inspect.cleandoc(cls.__doc__ or "")

    @classmethod
    def summary(cls) -> str:
        """The docstring's first line, without its full stop."""
        return cls.description().partition("\n")[0].rstrip(".")

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options."""

    @abstractmethod
    def run(self, arguments: argparse.Namespace) -> int:
        """Do it.

        Returns:
            The exit code.

        Raises:
            ConfigError: Bad input; ends with exit code 2.
            SafeLoaderError: It did not work; ends with exit code 1.
        """


def add_training(parser: argparse.ArgumentParser) -> None:
    """Which training a command is about: the options of `nnUNetv2_train`, as nnU-Net names them."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset: its number or name")
    parser.add_argument("-c", dest="configuration", required=True, help="configuration, for example 3d_fullres")
    parser.add_argument("-f", dest="fold", type=int, default=0, help="fold (default: 0)")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: nnUNetPlans)")
    parser.add_argument("-tr", dest="trainer", default="nnUNetTrainer", help="trainer (default: nnUNetTrainer)")


def show(text: str) -> None:
    """Print what may hold any character; a terminal that does not know one gets a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does: they leave the `with` blocks that end what a command started."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
