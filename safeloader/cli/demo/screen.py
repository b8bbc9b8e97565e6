"""What the demo shows: steps with their progress, the error of a training that died, and the table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from safeloader.cli.demo.training import HANG_S, Outcome, Run


class Screen:
    """Writes to the terminal; to a file or pipe it writes the lines and leaves out the moving parts."""

    def __init__(self, console: Console | None = None) -> None:
        """Show on `console`; None is the process's stdout."""
        self.console = console or Console(highlight=False)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step and show a spinner while it lasts."""
        self.say(title)
        with self.console.status("working"):
            yield

    @contextmanager
    def training(self, title: str) -> Iterator[TrainingView]:
        """Announce a training and show how it goes."""
        self.say(title)
        columns = (
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            yield TrainingView(self, progress)

    def last_words(self, run: Run, log: Path) -> None:
        """Show the end of what a training printed."""
        self.say(f"     {describe(run)}. The end of {log}:")
        for line in run.last_words:
            # Not wrapped, so that it can be copied and searched for.
            self.console.print(Text(f"     │ {line}", style="red"), soft_wrap=True)

    def table(self, runs: Sequence[Run]) -> None:
        """Compare the trainings."""
        table = Table(title="The same training, twice", title_justify="left", title_style="bold")
        table.add_column("trainer")
        for column in ("kills", "batches", "batches lost"):
            table.add_column(column, justify="right")
        table.add_column("outcome")
        table.add_column("Dice", justify="right")
        for run in runs:
            style = "green" if run.outcome is Outcome.FINISHED else "red"
            table.add_row(
                run.plan.title,
                str(len(run.kills)),
                f"{len(run.steps)} of {run.length.batches}",
                str(run.lost),
                Text(describe(run), style=style),
                "–" if run.dice is None else f"{run.dice:.3f}",
            )
        self.console.print()
        self.console.print(table)
        self.say("batches: those that the network was trained or validated on, recorded one by one by the trainer.")


class TrainingView:
    """The moving line of one training."""

    def __init__(self, screen: Screen, progress: Progress) -> None:
        """Show on `screen` by means of `progress`."""
        self._screen, self._progress = screen, progress
        self._task = progress.add_task("starting", total=None)
        self._told = 0

    def show(self, run: Run) -> None:
        """Bring the line up to date; without a terminal, say each tenth kill."""
        kills = len(run.kills)
        if not run.steps:
            doing = "nnU-Net starts"
        elif len(run.steps) == run.length.batches and run.outcome is None:
            doing = f"{kills} kills; nnU-Net's validation"
        else:
            doing = f"{kills} {'kill' if kills == 1 else 'kills'}"
        self._progress.update(self._task, completed=len(run.steps), total=run.length.batches, description=doing)
        if not self._screen.console.is_terminal and kills // 10 > self._told:
            self._told = kills // 10
            self._screen.say(f"  {kills} kills, {len(run.steps)} of {run.length.batches} batches")


def describe(run: Run) -> str:
    """How a training ended, in a few words."""
    if run.outcome is Outcome.FINISHED:
        return "finished" if run.restarts is None else f"finished, {run.restarts} workers replaced"
    if run.outcome is Outcome.HUNG:
        return f"hangs: no batch for {HANG_S:g} s after the kill"
    if run.kills and run.ended_s is not None:
        return f"died {run.ended_s - run.kills[-1].monotonic_s:.1f} s after the kill"
    return "died"


def count_signals(run: Run) -> str:
    """The kills of a run: "7 × SIGKILL, 7 × SIGSEGV, 6 × SIGBUS"."""
    return ", ".join(f"{number} × {name}" for name, number in Counter(k.signal for k in run.kills).items())
