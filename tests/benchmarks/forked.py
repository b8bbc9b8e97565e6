"""A benchmark whose measurements are forked from one process that has imported everything.

    python -m tests.benchmarks.forked NAME [its options]

To import torch and nnU-Net takes longer than a measurement at the smallest size. What is measured so means nothing: a
benchmark that is run by itself starts a fresh process for each.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import sys
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import common
from benchmarks.common import Benchmark

FORK = multiprocessing.get_context("fork")


def find(name: str) -> Benchmark[Any]:
    """The one benchmark of `benchmarks.NAME`."""
    module = importlib.import_module(f"benchmarks.{name}")
    (cls,) = (
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Benchmark) and thing is not Benchmark
    )
    made: Benchmark[Any] = cls()
    return made


def in_a_fork(benchmark: Benchmark[Any], name: str, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """In place of `common._in_a_fresh_process`."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_measure, args=(benchmark, json.dumps(case), there))
    process.start()
    there.close()
    try:
        found: list[dict[str, Any]] = json.loads(here.recv())
    except EOFError:
        process.join()
        raise RuntimeError(f"{name} {case} ended with {process.exitcode}, see above") from None
    process.join()
    return found


def _measure(benchmark: Benchmark[Any], case: str, there: Connection) -> None:
    there.send(json.dumps([asdict(row) for row in benchmark.measure(**json.loads(case))]))


def main(name: str, *argv: str) -> int:
    """Run it."""
    benchmark = find(name)
    if "data" in benchmark.full:  # it has nnU-Net's loader
        importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    common._in_a_fresh_process = functools.partial(in_a_fork, benchmark)
    return benchmark.main(argv)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
