"""Every message arrives as it was sent."""

from __future__ import annotations

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
