"""What the gauntlet shows: a row per training that went through it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.gauntlet.outcome import Outcome
from tests.gauntlet.training import Struck


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """The table, and below it what was not equal."""
    table = Table(title="Trained twice with one seed: undisturbed, and through the gauntlet", title_justify="left")
    table.add_column("kind")
    table.add_column("faults", justify="right")
    for column in ("Dice", "disturbed"):
        table.add_column(column, justify="right")
    table.add_column("equal")
    table.add_column("s", justify="right")
    for outcome in outcomes:
        well = not outcome.differences
        table.add_row(
            _title(outcome),
            _struck(outcome.disturbed.struck),
            *("–" if dice is None else f"{dice:.6f}" for dice in outcome.dice),
            Text("yes" if well else "NO", style="green" if well else "red"),
            f"{outcome.undisturbed.seconds + outcome.disturbed.seconds:.0f}",
        )
    console.print(table)
    if outcomes:
        thrown = [f"{fault.times} × {fault.name}" for fault in outcomes[-1].disturbed.struck]
        console.print(f"faults: {', '.join(thrown)}")
    console.print("equal: every batch, all weights and nnU-Net's summary.json, bit for bit; nothing is left running.")
    for outcome in outcomes:
        for difference in outcome.differences:
            console.print(Text(f"{_title(outcome)}: {difference}", style="red"), soft_wrap=True)


def _struck(faults: Sequence[Struck]) -> str:
    proven = [fault for fault in faults if fault.proven]
    return f"{len(proven)} of {len(faults)}"


def _title(outcome: Outcome) -> str:
    return outcome.undisturbed.configuration if outcome.kind == "cascade" else outcome.kind
