"""What a worker says of its cases."""

from __future__ import annotations

from safeloader.pool import wire
from safeloader.pool.cases import Cases


def test_a_message_about_many_long_names_in_any_script_stays_small() -> None:
    cases = Cases(lambda stage, names: None)
    cases.made({"keys": [f"{number}{'脳' * 300}" for number in range(400)]})
    assert len(cases.batch) > 50
    assert len(wire.pack(wire.Done(1, 2, cases.batch))) < wire.MAX_PACKET_NBYTES // 2
    cases.begin()
    cases.made({"keys": [f"case_{number:03d}" for number in range(300)]})
    assert len(cases.batch) == 256
