"""Every message arrives as it was sent."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest

from safeloader.pool import wire


@pytest.mark.parametrize("kind", wire.ROUTES, ids=lambda kind: kind.__name__)
def test_a_message_is_unpacked_as_it_was_packed(kind: type[wire.Message]) -> None:
    message = kind(*(f"{field.name}" for field in fields(kind)))  # type: ignore[arg-type]
    assert wire.unpack(wire.pack(message)) == message


def test_a_part_of_a_message_may_have_parts() -> None:
    order = wire.Fork(1, 2, 3, "sl-train-2", None, 4, 5, audit=False, course=wire.Course(2, None))
    assert wire.unpack(wire.pack(order)) == order


def test_a_channel_tells_nothing_yet_from_the_end() -> None:
    ours, theirs = wire.Channel.pair()
    assert ours.hear() is None
    theirs.send(wire.Failed(3, 1))
    theirs.close()
    assert ours.hear() == wire.Failed(3, 1)
    with pytest.raises(wire.ChannelClosedError):
        ours.hear()
    ours.close()


def test_who_waits_gets_the_descriptors_too() -> None:
    ours, theirs = wire.Channel.pair()
    readable, writable = os.pipe()
    ours.send(wire.Produce(3, 1, 0), [writable])
    message, (received,) = theirs.receive()
    assert message == wire.Produce(3, 1, 0)
    os.write(received, b"through the copy")
    assert os.read(readable, 100) == b"through the copy"
    for fd in (readable, writable, received):
        os.close(fd)
    ours.close()
    with pytest.raises(wire.ChannelClosedError):
        theirs.receive()
    theirs.close()
