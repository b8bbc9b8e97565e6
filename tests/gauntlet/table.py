"""What the gauntlet shows: a row per training that went through it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.gauntlet.outcome import Outcome


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """The table, and below it what was not equal."""
    table = Table(title="Trained twice with one seed: undisturbed, and through the gauntlet", title_justify="left")
    table.add_column("kind")
    table.add_column("faults that struck")
    for column in ("Dice undisturbed", "disturbed"):
        table.add_column(column, justify="right")
    table.add_column("equal")
    table.add_column("s", justify="right")
    for outcome in outcomes:
        well = not outcome.differences
        table.add_row(
            _title(outcome),
            ", ".join(f"{fault.times} × {fault.name}" for fault in outcome.disturbed.struck),
            *("–" if dice is None else f"{dice:.6f}" for dice in outcome.dice),
            Text("yes" if well else "NO", style="green" if well else "red"),
            f"{outcome.undisturbed.seconds + outcome.disturbed.seconds:.0f}",
        )
    console.print(table)
    console.print("equal: every batch, all weights and nnU-Net's summary.json, bit for bit; nothing is left running.")
    for outcome in outcomes:
        for difference in outcome.differences:
            console.print(Text(f"{_title(outcome)}: {difference}", style="red"), soft_wrap=True)


def _title(outcome: Outcome) -> str:
    several = outcome.kind == "cascade"
    return f"{outcome.kind}: {outcome.undisturbed.configuration}" if several else outcome.kind
