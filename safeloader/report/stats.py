"""What a pool is doing, and what it has done. Plain frozen data, made by `pool.Pool` and `SafeAugmenter`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from safeloader.faults.incident import Incident


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """One worker, now.

    Attributes:
        worker: its index, from 0.
        pid: its process id, or None while it is not running.
        incarnation: which life it is in, from 0.
        state: "starting", "ready", "down" (it is to be started again), or "resting" (it is started when it is needed).
        stage: what it is doing: "starting", "loading", "transforming", "encoding" or "idle".
        ticket: what it is working on, or None.
        case: the sample's identifier, or None where it is not known.
        since_s: seconds in this stage.
        batches: how many it has made in this life.
        memory_nbytes: its resident memory, or None while it is not running.
    """

    worker: int
    pid: int | None
    incarnation: int
    state: str
    stage: str
    ticket: int | None
    case: str | None
    since_s: float
    batches: int
    memory_nbytes: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a loader did since it was made, over all its starts.

    Attributes:
        name: what messages call it.
        batches: delivered to the consumer.
        next_ticket: the first ticket that was not delivered.
        restarts: workers started again after a death.
        incidents: the failures, oldest first; the latest thousand in full.
        incident_counts: all of them, by kind.
        quarantined: cases that are no longer drawn.
        wait_s: seconds that the consumer waited in `next()`.
        uptime_s: seconds since the first start.
        seed: the root seed: giving it as `seed=` gives the same stream.
        stream: which stream of it.
        workers: how many workers.
        resting: how many of them have left for now, because there was nothing to do.
        start_method: "clean" or "forked".
        slots: how many slots are free, filling, ready and leased; None where there is no pool.
    """

    name: str
    batches: int
    next_ticket: int
    restarts: int
    incidents: tuple[Incident, ...]
    incident_counts: dict[str, int]
    quarantined: tuple[str, ...]
    wait_s: float
    uptime_s: float
    seed: int
    stream: int
    workers: int
    resting: int
    start_method: str
    slots: dict[str, int] | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self)
