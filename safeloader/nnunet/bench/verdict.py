"""What bounds a training, as a pure function of what was measured.

    the network takes fewer than the workers make  ─► the GPU (or the network, on this CPU)
    it would take more                             ─► what the workers' time goes into: CPU, storage, handing over
    within 10 % of each other                      ─► both are named

The same margin holds between the shares of the workers' time: what is within it of the largest is named as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from safeloader.nnunet.bench.measured import Measured, Network

MARGIN: Final = 0.1
"""Two measurements closer than this are not told apart."""


class Bound(str, Enum):
    """What a training waits for; the value is its name in a sentence."""

    GPU = "the GPU"
    NETWORK = "the network, on this CPU,"
    CPU = "the CPU"
    STORAGE = "storage"
    LOADER = "the loader"


@dataclass(frozen=True)
class Verdict:
    """What bounds the training, the sentence with the numbers behind it, what to do, and what else to know."""

    bounds: tuple[Bound, ...]
    finding: str
    advice: str
    notes: tuple[str, ...]


def judge(measured: Measured) -> Verdict:
    """Decide."""
    bounds = _bounds(measured)
    return Verdict(bounds, _finding(measured, bounds), _advice(measured, bounds), tuple(_notes(measured)))


def _bounds(measured: Measured) -> tuple[Bound, ...]:
    network, workers = measured.network, _workers_bounds(measured)
    if network is None:
        return workers
    device = Bound.GPU if network.gpu else Bound.NETWORK
    ours = measured.pools.ours_per_s
    if ours > network.per_s * (1 + MARGIN):
        return (device,)
    if ours * (1 + MARGIN) < network.per_s and not network.at_most:
        return workers
    return (device, *workers)


def _workers_bounds(measured: Measured) -> tuple[Bound, ...]:
    """What the workers' time goes into, the most first."""
    shares = measured.pools.shares
    each = {Bound.CPU: shares.computing, Bound.STORAGE: shares.storage, Bound.LOADER: shares.handing_over}
    ordered = sorted(each, key=lambda bound: each[bound], reverse=True)
    return tuple(bound for bound in ordered if each[bound] >= each[ordered[0]] - MARGIN)


def _finding(measured: Measured, bounds: Sequence[Bound]) -> str:
    pools = measured.pools
    who = " and ".join(bounds)
    verb = "bounds" if len(bounds) == 1 else "bound"
    makes = f"{_workers(pools.workers)} {'makes' if pools.workers == 1 else 'make'} {_rate(pools.ours_per_s)} batches/s"
    if set(bounds) - {Bound.GPU, Bound.NETWORK}:
        shares = pools.shares
        makes += (
            f" ({shares.computing:.0%} of their time computing, {shares.storage:.0%} waiting for files, "
            f"{shares.handing_over:.0%} handing over)"
        )
    if measured.network is None:
        return f"{_capital(who)} {verb} the loading: {makes}; what the network takes was not measured."
    return f"{_capital(who)} {verb} this training: {makes}, and {_takes(measured.network)}."


def _takes(network: Network) -> str:
    device = "the GPU" if network.gpu else "the network on this CPU"
    return f"{device} takes {'fewer than ' if network.at_most else ''}{_rate(network.per_s)}"


def _advice(measured: Measured, bounds: Sequence[Bound]) -> str:
    network = measured.network
    if network is not None and bounds[0] in (Bound.GPU, Bound.NETWORK):
        if len(bounds) > 1:
            return "Nothing to do: they are balanced within 10 %, and more of one alone gains little."
        return _nothing(measured, network)
    if bounds[0] is Bound.STORAGE:
        return _for_storage(measured)
    if bounds[0] is Bound.LOADER:
        return (
            "The workers wait to hand their batches over: fewer of them would do as much; if that is not so, it is a "
            "fault of SafeLoader's, and what --json prints belongs into its report."
        )
    return _for_cpu(measured)


def _nothing(measured: Measured, network: Network) -> str:
    enough, workers = workers_for(measured, network.per_s * (1 + MARGIN)), measured.pools.workers
    fewer = f"{_workers(enough)} would do (nnUNet_n_proc_DA={enough})" if enough < workers else "the workers keep up"
    return f"Nothing to do for the loading: {fewer}."


def _for_cpu(measured: Measured) -> str:
    pools, network, one = measured.pools, measured.network, measured.one_worker
    spare = pools.cpus - pools.workers
    if network is None:
        more = f"{spare} more CPUs are free for workers (nnUNet_n_proc_DA)" if spare > 0 else "more cores make more"
        part = one.transforming.cpu_s / max(one.transforming.cpu_s + one.loading_later.cpu_s, 1e-9)
        return f"If the network takes more than that, {more}; {part:.0%} of a batch's CPU time is augmentation."
    enough = workers_for(measured, network.per_s)
    if enough <= pools.cpus:
        return f"Use {_workers(enough)} (nnUNet_n_proc_DA={enough}): there are {pools.cpus} CPUs."
    idle = 1 - pools.ours_per_s / network.per_s
    device = "the GPU" if network.gpu else "the network"
    return (
        f"More cores: about {enough} would keep up; with {_workers(pools.workers)} on {pools.cpus} CPUs, {device} has "
        f"nothing to do for {idle:.0%} of the time."
    )


def _for_storage(measured: Measured) -> str:
    one = measured.one_worker
    seen = (
        f"a batch's files took {one.loading_first.wall_s:.3g} s the first time, {one.loading_later.wall_s:.3g} s later"
    )
    return (
        "Faster storage: put nnUNet_preprocessed on a local SSD, or leave enough memory free to keep the files cached; "
        f"{seen}."
    )


def _notes(measured: Measured) -> list[str]:
    one, pools, notes = measured.one_worker, measured.pools, []
    if one.transforming.wall_s > one.transforming.cpu_s * (1 + 2 * MARGIN):
        notes.append(
            "Other programs used the CPUs meanwhile (one worker alone did not get all of one): the figures are too low."
        )
    if waits_s(measured) > MARGIN * (one.loading_first.wall_s + one.transforming.wall_s):
        notes.append(
            f"The first reading of files waited {waits_s(measured):.2g} s a batch for storage: if the dataset is "
            "larger than memory, every epoch does."
        )
    if pools.asked > pools.workers:
        notes.append(f"{pools.asked} workers were asked for; there are {pools.cpus} CPUs.")
    if pools.stock_failed is not None:
        notes.append(f"The stock class: {pools.stock_failed}.")
    if measured.network is None and measured.network_missing is not None:
        notes.append(f"The network was not measured: {measured.network_missing}.")
    if measured.network is not None and not measured.network.gpu:
        notes.append("Network and workers share these CPUs in training; each was measured without the other.")
    return notes


def waits_s(measured: Measured) -> float:
    """Seconds per batch that one worker waited for storage in the first pass.

    What is more on the clock than of CPU, in the proportion that is more while transforming, is other programs' doing.
    """
    one = measured.one_worker
    busy = max(1.0, one.transforming.wall_s / one.transforming.cpu_s) if one.transforming.cpu_s > 0 else 1.0
    return max(0.0, one.loading_first.wall_s - busy * one.loading_first.cpu_s)


def workers_for(measured: Measured, per_s: float) -> int:
    """How many workers make so many batches per second, if each makes as many as it did."""
    return max(1, math.ceil(per_s * measured.pools.workers / measured.pools.ours_per_s - 1e-9))


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _rate(per_s: float) -> str:
    return f"{per_s:.3g}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
