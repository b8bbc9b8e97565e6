"""The end of a lease, under signals: see also `tests/process/test_leases.py`."""

from __future__ import annotations

import select
import signal
from collections import deque

from safeloader.pool.mailbox import Wakeup
from safeloader.ring.lease import Lease, lease
from safeloader.ring.memfile import MemoryFile


def test_no_interrupt_is_lost_while_a_lease_ends() -> None:
    """What a handler raises while Python runs a callback of a weak reference would be dropped."""

    class InterruptError(Exception):
        pass

    armed, raised, caught = False, 0, 0

    def interrupt(*_: object) -> None:
        nonlocal armed, raised
        if armed:
            armed = False
            raised += 1
            raise InterruptError

    ended: deque[Lease] = deque()
    wakeup = Wakeup()
    file = MemoryFile.create("safeloader-test", 4096)
    mapping = file.map()
    held: list[Lease] = []
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        while raised < 200:
            views = []
            for _ in range(2000):
                view, its = lease(mapping, len(held), ended, wakeup.set)
                views.append(view)
                held.append(its)
            del view
            while views:
                try:
                    armed = True
                    while views:
                        views.pop()
                    armed = False
                except InterruptError:
                    caught += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert caught == raised
    assert sorted(its.slot for its in ended) == [its.slot for its in held], "each is told of once"
    assert select.select([wakeup.fd], [], [], 0)[0], "each end is heard"
    file.close()
