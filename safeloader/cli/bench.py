"""`safeloader bench`: what bounds a training, measured on the user's own dataset."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from safeloader.cli.command import Command, add_training, show, signals_interrupt
from safeloader.errors import ConfigError

if TYPE_CHECKING:
    from safeloader.nnunet.bench.measured import Cost, Measured
    from safeloader.nnunet.bench.verdict import Verdict
    from safeloader.nnunet.stock import Asked


class Bench(Command):
    """Say what bounds a training: the GPU, the CPU, storage or the loader.

    Measures, on your dataset and this machine: what one worker needs for a batch, loading and transforming apart; how
    many batches per second all workers make, with nnU-Net's stock class and with SafeLoader; and how many the network
    takes, with the trainer's own training step. Then one sentence says what bounds the training, and one what to do.

    Three to four times --seconds, and the time for starting. Nothing is written into nnU-Net's folders. As many
    workers as nnU-Net would use (nnUNet_n_proc_DA), lowered to the CPUs that this process may use.

    Exit codes: 0 measured, 1 no batches could be made, 2 the dataset, configuration or trainer can't be used.
    """

    name = "bench"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_training(parser)
        parser.add_argument("--seconds", type=float, default=20.0, help="for each measurement (default: 20)")
        parser.add_argument("--workers", type=int, help="instead of nnU-Net's number")
        parser.add_argument("--no-network", action="store_true", help="don't train any step")
        parser.add_argument("--json", action="store_true", help="print all numbers as JSON, for scripts")

    def run(self, arguments: argparse.Namespace) -> int:
        """Measure, and say what it means."""
        _check(arguments)
        from safeloader.nnunet.bench.verdict import judge  # torch and nnU-Net take seconds to import
        from safeloader.nnunet.stock import Asked

        asked = Asked(arguments.dataset, arguments.configuration, arguments.fold, arguments.plans, arguments.trainer)
        with signals_interrupt():
            measured = _measure(asked, arguments)
        verdict = judge(measured)
        if arguments.json:
            print(json.dumps({**asdict(asked), **asdict(measured), "verdict": asdict(verdict)}, indent=2))
        else:
            show(in_words(asked, measured, verdict))
        return 0


def _check(arguments: argparse.Namespace) -> None:
    if not (math.isfinite(arguments.seconds) and arguments.seconds > 0):
        raise ConfigError(f"--seconds {arguments.seconds:g}: must be more than 0")
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: must be at least 1")


def _measure(asked: Asked, arguments: argparse.Namespace) -> Measured:
    from safeloader.nnunet.bench.measured import Measured
    from safeloader.nnunet.bench.network import NetworkNotMeasuredError, measure_network
    from safeloader.nnunet.bench.one_worker import measure_one_worker
    from safeloader.nnunet.bench.pools import count_workers, measure_pools
    from safeloader.nnunet.stock import training_loader
    from safeloader.pool.blur import always_convolve_directly

    seconds = arguments.seconds
    counted = count_workers(arguments.workers)
    loader = training_loader(asked).loader
    always_convolve_directly(loader)
    _progress(f"one worker: loading and transforming, {seconds:g} s")
    one_worker = measure_one_worker(loader, seconds)
    _progress(f"all workers ({counted.workers}): the stock class and SafeLoader in turn, {seconds:g} s each")
    pools = measure_pools(loader, counted, seconds=seconds)
    if arguments.no_network:
        return Measured(one_worker=one_worker, pools=pools, network=None, network_missing=None)
    _progress(f"the network: training steps with one batch, {seconds:g} s")
    try:
        network = measure_network(asked, seconds)
    except NetworkNotMeasuredError as error:
        return Measured(one_worker=one_worker, pools=pools, network=None, network_missing=str(error))
    return Measured(one_worker=one_worker, pools=pools, network=network, network_missing=None)


def _progress(what: str) -> None:
    print(f"measuring {what} …", file=sys.stderr, flush=True)


def in_words(asked: Asked, measured: Measured, verdict: Verdict) -> str:
    """The table, the two sentences, and what else to know."""
    one, pools, network = measured.one_worker, measured.pools, measured.network
    shares = pools.shares
    lines = [
        f"{asked}",
        "",
        "one worker, s per batch     on the clock       CPU",
        _line("loading, the first time", one.loading_first, f"{one.cases} of {one.all_cases} cases"),
        _line("loading, later", one.loading_later, ""),
        _line("transforming", one.transforming, ""),
        "",
        f"{pools.workers} worker{'' if pools.workers == 1 else 's'}, batches/s",
        f"  stock                   {'–' if pools.stock_per_s is None else f'{pools.stock_per_s:.3g}':>14}",
        f"  SafeLoader              {f'{pools.ours_per_s:.3g}':>14}     {shares.computing:.0%} computing, "
        f"{shares.storage:.0%} waiting for files, {shares.handing_over:.0%} handing over",
    ]
    if network is not None:
        rate = f"{'< ' if network.at_most else ''}{network.per_s:.3g}"
        steps = f"{network.steps} step{'' if network.steps == 1 else 's'}"
        lines += ["", "network, batches/s", f"  {network.device:<24}{rate:>14}     {steps}"]
    lines += ["", verdict.finding, verdict.advice, *(f"Note: {note}" for note in verdict.notes)]
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, cost: Cost, more: str) -> str:
    return f"  {name:<24}{cost.wall_s:>14.3f}{cost.cpu_s:>10.3f}     {more}"
