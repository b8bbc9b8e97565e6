"""What `safeloader top` sees of this process's pools: plain data, made when somebody looks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from safeloader.pool.pool import Pool

VERSION: Final = 1
_INCIDENTS: Final = 5
"""The latest that are shown of a pool."""
_MESSAGE_CHARS: Final = 500


def view(pools: Iterable[Pool]) -> dict[str, Any]:
    """The process and its pools. Times are seconds, `at_s` is on `time.monotonic`'s clock."""
    return {
        "version": VERSION,
        "pid": os.getpid(),
        "at_s": time.monotonic(),
        "pools": [_pool(pool) for pool in pools],
    }


def _pool(pool: Pool) -> dict[str, Any]:
    consumer, book, waiting = pool.consumer, pool.book, pool.consumer.waiting
    waiting_s = 0.0 if waiting is None else time.monotonic() - waiting[1]
    latest = list(islice(reversed(book.incidents), _INCIDENTS))
    return {
        "name": pool.name,
        "folder": pool.options.folder,
        "seed": pool.seed,
        "stream": pool.options.stream,
        "batches": consumer.batches,
        "next_ticket": consumer.next_ticket,
        "wait_s": consumer.wait_s + waiting_s,
        "waiting_s": waiting_s,
        "waits_for": None if waiting is None else pool.waiting_for(waiting[0]),
        "restarts": pool.machine.restarts,
        "start_method": "forked" if pool.use_fork else "clean",
        "slots": pool.slots(),
        "incident_counts": dict(book.kinds),
        "quarantined": list(pool.machine.blame.quarantined),
        "workers": [asdict(worker) for worker in pool.workers()],
        "incidents": [{"at": one.at, "kind": one.kind, "message": one.message[:_MESSAGE_CHARS]} for one in latest],
    }
