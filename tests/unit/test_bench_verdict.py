"""What `safeloader bench` says about numbers that it measured: each verdict, and its margins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from safeloader.nnunet.bench.measured import Cost, Measured, Network, OneWorker, Pools, Shares
from safeloader.nnunet.bench.verdict import Bound, judge, waits_s, workers_for

GPU = Network(per_s=4.0, steps=80, device="NVIDIA H100", gpu=True)
BUSY = Shares(computing=0.97, storage=0.01, handing_over=0.02)


def cost(wall_s: float, cpu_s: float | None = None) -> Cost:
    return Cost(wall_s=wall_s, cpu_s=wall_s if cpu_s is None else cpu_s)


ONE = OneWorker(
    cases=40, all_cases=40, batches=40, loading_first=cost(0.3), loading_later=cost(0.2), transforming=cost(0.6)
)


def measured(
    ours_per_s: float,
    network: Network | None = GPU,
    *,
    shares: Shares = BUSY,
    one_worker: OneWorker = ONE,
    missing: str | None = None,
    **of_pools: Any,
) -> Measured:
    counted: dict[str, Any] = {"workers": 12, "asked": 12, "cpus": 16, "stock_per_s": ours_per_s, "stock_failed": None}
    pools = Pools(**{**counted, **of_pools}, ours_per_s=ours_per_s, shares=shares)
    return Measured(one_worker=one_worker, pools=pools, network=network, network_missing=missing)


def test_workers_that_make_more_than_the_gpu_takes() -> None:
    verdict = judge(measured(8.0))
    assert verdict.bounds == (Bound.GPU,)
    assert verdict.finding == "The GPU bounds this training: 12 workers make 8 batches/s, and the GPU takes 4."
    assert verdict.advice == "Nothing to do for the loading: 7 workers would do (nnUNet_n_proc_DA=7)."
    assert verdict.notes == ()


def test_workers_that_just_keep_up_are_not_to_be_fewer() -> None:
    assert judge(measured(4.5)).advice == "Nothing to do for the loading: the workers keep up."


def test_a_cpu_that_trains_the_network_is_named_so() -> None:
    verdict = judge(measured(2.0, Network(per_s=0.05, steps=3, device="CPU", gpu=False)))
    assert verdict.bounds == (Bound.NETWORK,)
    assert verdict.finding.startswith(
        "The network, on this CPU, bounds this training: 12 workers make 2 batches/s, and"
    )
    assert "Network and workers share these CPUs" in verdict.notes[-1]


def test_a_network_of_which_no_step_ended() -> None:
    slow = Network(per_s=1 / 80, steps=0, device="CPU", gpu=False, at_most=True)
    assert judge(measured(1.0, slow)).bounds == (Bound.NETWORK,)
    assert "takes fewer than 0.0125." in judge(measured(1.0, slow)).finding
    # Workers that are even slower: the network may be slower still, or not.
    assert judge(measured(0.005, slow)).bounds == (Bound.NETWORK, Bound.CPU)


def test_workers_that_compute_all_the_time() -> None:
    verdict = judge(measured(2.0, workers=12, cpus=12))
    assert verdict.bounds == (Bound.CPU,)
    assert verdict.finding == (
        "The CPU bounds this training: 12 workers make 2 batches/s (97% of their time computing, 1% waiting for files, "
        "2% handing over), and the GPU takes 4."
    )
    assert verdict.advice == (
        "More cores: about 24 would keep up; with 12 workers on 12 CPUs, the GPU has nothing to do for 50% of the time."
    )


def test_cpus_that_are_there_and_not_used() -> None:
    assert judge(measured(2.0, workers=4)).advice == "Use 8 workers (nnUNet_n_proc_DA=8): there are 16 CPUs."


def test_workers_that_wait_for_files() -> None:
    first = replace(ONE, loading_first=cost(1.5, 0.3))
    shares = Shares(computing=0.35, storage=0.6, handing_over=0.05)
    verdict = judge(measured(2.0, shares=shares, one_worker=first))
    assert verdict.bounds == (Bound.STORAGE,)
    assert verdict.finding.startswith("Storage bounds this training: 12 workers make 2 batches/s (35% of their time")
    assert verdict.advice.startswith("Faster storage: ") and "1.5 s the first time, 0.2 s later" in verdict.advice
    assert verdict.notes[0].startswith("The first reading of files waited 1.2 s a batch for storage")


def test_workers_that_wait_to_hand_over() -> None:
    verdict = judge(measured(2.0, shares=Shares(computing=0.3, storage=0.1, handing_over=0.6)))
    assert verdict.bounds == (Bound.LOADER,)
    assert verdict.finding.startswith("The loader bounds this training")
    assert "a fault of SafeLoader's" in verdict.advice


@pytest.mark.parametrize(("ours_per_s", "both"), [(3.5, False), (3.7, True), (4.0, True), (4.3, True), (4.5, False)])
def test_what_is_within_a_tenth_of_each_other_is_not_told_apart(ours_per_s: float, both: bool) -> None:
    verdict = judge(measured(ours_per_s))
    assert (verdict.bounds == (Bound.GPU, Bound.CPU)) == both
    if both:
        assert verdict.finding.startswith("The GPU and the CPU bound this training: 12 workers make ")
        assert verdict.advice.startswith("Nothing to do: they are balanced within 10 %")


@pytest.mark.parametrize(
    ("storage", "bounds"),
    [(0.40, (Bound.CPU,)), (0.45, (Bound.CPU, Bound.STORAGE)), (0.52, (Bound.STORAGE, Bound.CPU))],
)
def test_so_are_parts_of_the_workers_time(storage: float, bounds: tuple[Bound, ...]) -> None:
    shares = Shares(computing=0.98 - storage, storage=storage, handing_over=0.02)
    assert judge(measured(2.0, shares=shares)).bounds == bounds


def test_without_the_network_only_the_loading_is_judged() -> None:
    verdict = judge(measured(2.0, None, missing="a training step failed: OutOfMemoryError"))
    assert verdict.bounds == (Bound.CPU,)
    assert verdict.finding.startswith("The CPU bounds the loading: 12 workers make 2 batches/s (97%")
    assert verdict.finding.endswith("; what the network takes was not measured.")
    assert verdict.advice == (
        "If the network takes more than that, 4 more CPUs are free for workers (nnUNet_n_proc_DA); 75% of a batch's "
        "CPU time is augmentation."
    )
    assert verdict.notes == ("The network was not measured: a training step failed: OutOfMemoryError.",)
    assert "more cores make more" in judge(measured(2.0, None, cpus=12)).advice


def test_other_programs_on_the_cpus_are_no_storage() -> None:
    squeezed = replace(ONE, loading_first=cost(0.6, 0.3), transforming=cost(1.2, 0.6))
    assert waits_s(measured(2.0, one_worker=squeezed)) == 0
    (note,) = judge(measured(2.0, one_worker=squeezed)).notes
    assert note.startswith("Other programs used the CPUs meanwhile")


def test_what_else_is_said() -> None:
    notes = judge(measured(8.0, asked=32, workers=16, stock_per_s=None, stock_failed="a worker has died")).notes
    assert notes == ("32 workers were asked for; there are 16 CPUs.", "The stock class: a worker has died.")


@pytest.mark.parametrize(("per_s", "workers"), [(0.1, 1), (4.0, 12), (4.1, 13), (8.0, 24)])
def test_how_many_workers_would_suffice(per_s: float, workers: int) -> None:
    assert workers_for(measured(4.0), per_s) == workers
