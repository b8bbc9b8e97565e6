"""The end of a lease, under signals: see also `tests/process/test_leases.py`."""

from __future__ import annotations

import select
from collections import deque

from safeloader.pool.mailbox import Wakeup
from safeloader.ring.lease import Lease, lease
from safeloader.ring.memfile import MemoryFile
from tests.interrupts import InterruptError, interrupts


def test_no_interrupt_is_lost_while_a_lease_ends() -> None:
    """What a handler raises while Python runs a callback of a weak reference would be dropped."""

    ended: deque[Lease] = deque()
    wakeup = Wakeup()
    file = MemoryFile.create("safeloader-test", 4096)
    mapping = file.map()
    held: list[Lease] = []
    caught = 0
    with interrupts(0.0005) as signals:
        while signals.raised < 200:
            views = []
            for _ in range(2000):
                view, its = lease(mapping, len(held), ended, wakeup.set)
                views.append(view)
                held.append(its)
            del view
            while views:
                try:
                    signals.armed = True
                    while views:
                        views.pop()
                    signals.armed = False
                except InterruptError:
                    caught += 1
    assert caught == signals.raised
    assert sorted(its.slot for its in ended) == [its.slot for its in held], "each is told of once"
    assert select.select([wakeup.fd], [], [], 0)[0], "each end is heard"
    file.close()
