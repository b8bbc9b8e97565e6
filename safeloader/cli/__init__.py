"""The command `safeloader`: one file per command, each a class whose docstring is its help.

A new command is a subclass of `Command` in a file of its own, and one line in `COMMANDS`.

Exit codes: 0 it worked, 1 it did not, 2 it was called wrongly, 130 Ctrl-C. Bad input gets one line, no traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from safeloader.cli.audit import Audit
from safeloader.cli.bench import Bench
from safeloader.cli.check import Check
from safeloader.cli.command import Command
from safeloader.cli.demo import Demo
from safeloader.cli.doctor import Doctor
from safeloader.cli.explain import Explain
from safeloader.cli.install import Install
from safeloader.cli.report import Report
from safeloader.cli.top import Top
from safeloader.errors import ConfigError, SafeLoaderError

COMMANDS: Final[tuple[type[Command], ...]] = (Audit, Bench, Check, Demo, Doctor, Explain, Install, Report, Top)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command()
    try:
        return command.run(arguments)
    except ConfigError as error:
        print(f"safeloader {command.name}: {error}", file=sys.stderr)
        return 2
    except SafeLoaderError as error:
        print(f"safeloader {command.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"safeloader {command.name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safeloader", description="Data loading for nnU-Net that survives its workers."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary(),
            description=command.description(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser
