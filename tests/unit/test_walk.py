"""The walk over a loader finds what is in it, in one order, and runs nothing of the user's."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from safeloader.pool.walk import attributes_of, walk


class Treasure:
    """What is to be found."""

    def method(self) -> None: ...

    def numbers(self) -> Iterator[int]:
        yield from itertools.count()


class Plain:
    def __init__(self, inner: object) -> None:
        self.inner = inner


class Slotted:
    __slots__ = ("inner", "never_set")

    def __init__(self, inner: object) -> None:
        self.inner = inner


class PrivateSlot(Slotted):
    __slots__ = ("__hidden",)

    def __init__(self, inner: object) -> None:
        self.__hidden = inner


class SlotsAndDict(Slotted):
    def __init__(self, inner: object) -> None:
        self.more = inner


class MyList(list[Any]):
    """Hides what it has from everybody who asks politely."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the user's code ran")


class MyDict(dict[str, Any]):
    def values(self) -> Any:
        raise AssertionError("the user's code ran")


class MyPartial(functools.partial):  # type: ignore[type-arg]
    def __getattribute__(self, name: str) -> Any:
        raise AssertionError("the user's code ran")


def in_closure(treasure: object) -> Callable[[], object]:
    return lambda: treasure


def in_default(treasure: object) -> Callable[..., object]:
    def draw(one: object = treasure) -> object:
        return one

    return draw


def in_keyword_default(treasure: object) -> Callable[..., object]:
    def draw(*, one: object = treasure) -> object:
        return one

    return draw


def wrapped(treasure: object) -> Callable[..., object]:
    @functools.wraps(in_closure(treasure))
    def draw() -> None: ...

    return draw


def generator(treasure: object) -> Iterator[object]:
    yield None
    yield treasure


def started(treasure: object) -> Iterator[object]:
    def numbers() -> Iterator[object]:
        local = [treasure]
        while True:
            yield len(local)

    running = numbers()
    next(running)
    return running


def delegating(treasure: object) -> Iterator[object]:
    def outer() -> Iterator[object]:
        yield from started(treasure)

    running = outer()
    next(running)
    return running


def from_class(treasure: object) -> Any:
    """A class is not looked into, but its instance's method is, wherever the instance is."""
    return Plain(treasure).__init__  # type: ignore[misc]


PLACES: dict[str, Callable[[Treasure], object]] = {
    "itself": lambda t: t,
    "attribute": Plain,
    "namespace": lambda t: SimpleNamespace(key=t),
    "slot": Slotted,
    "private slot": PrivateSlot,
    "attribute beside slots": SlotsAndDict,
    "list": lambda t: [1, t],
    "tuple": lambda t: (None, (t,)),
    "deque": lambda t: deque([t]),
    "dict": lambda t: {"key": t},
    "ordered dict": lambda t: OrderedDict(key=t),
    "default dict": lambda t: defaultdict(int, key=t),
    "list of the user's": lambda t: MyList([t]),
    "dict of the user's": lambda t: MyDict(key=t),
    "partial's function": lambda t: functools.partial(t.method),
    "partial's argument": lambda t: functools.partial(print, t),
    "partial's keyword": lambda t: functools.partial(print, end=t),
    "partial of the user's": lambda t: MyPartial(print, t),
    "bound method": lambda t: t.method,
    "bound method from a class": from_class,
    "built-in method": lambda t: [t].append,
    "slot wrapper": lambda t: [t].__len__,
    "closure": in_closure,
    "default": in_default,
    "keyword default": in_keyword_default,
    "wrapped function": wrapped,
    "generator that was not started": generator,
    "generator's variable": started,
    "generator that delegates": delegating,
    "generator's self": lambda t: t.numbers(),
    "generator expression": lambda t: (one for one in [t]),
    "itertools": lambda t: itertools.chain([1], itertools.cycle([t])),
    "map": lambda t: map(t.method, [1]),
    "iterator": lambda t: iter([t]),
}


@pytest.mark.parametrize("place", PLACES)
def test_finds_what_is_there(place: str) -> None:
    treasure = Treasure()
    found = [thing for thing in walk(Plain([PLACES[place](treasure)])) if type(thing) is Treasure]
    assert len(found) == 1 and found[0] is treasure


def test_all_roots_are_walked_and_each_object_comes_once() -> None:
    treasure = Treasure()
    first, second = Plain(treasure), Slotted([treasure, treasure])
    found = list(walk(first, second, first))
    assert found[:3] == [first, second, treasure], "the roots, then what is nearest"
    assert len(found) == 4, "and the list"


def test_a_cycle_ends() -> None:
    ring: list[object] = []
    ring.append(Plain(ring))
    assert len(list(walk(ring))) == 2


def test_depth_has_no_limit() -> None:
    inner: object = Treasure()
    for _ in range(50_000):
        inner = [inner]
    assert type(list(walk(inner))[-1]) is Treasure


@pytest.mark.parametrize("leaf", [None, True, 1, 1.5, "a", b"b", np.ones(2), np.float32(1), torch.ones(2), Plain, math])
def test_leaves_are_not_yielded(leaf: object) -> None:
    assert list(walk(leaf, [leaf])) == [[leaf]]


def test_functions_do_not_lead_to_their_module() -> None:
    """`walk` of a function of this module would else find all of it."""
    assert list(walk(in_closure)) == [in_closure]


def test_an_empty_cell_and_a_finished_generator_hold_nothing() -> None:
    def has_an_empty_cell() -> Callable[[], object]:
        def draw() -> object:
            return later

        if not draw:
            later = 1
        return draw

    finished = generator(Treasure())
    assert len(list(finished)) == 2
    assert len(list(walk(has_an_empty_cell(), finished))) == 2


class Touchy(Plain):
    """Whatever it is asked, the user's code would run."""

    def refuse(self, *_: object) -> Any:
        raise AssertionError("the user's code ran")

    __getattribute__ = __eq__ = __hash__ = __len__ = __bool__ = __iter__ = __repr__ = refuse  # type: ignore[assignment]
    __dict__ = property(refuse)  # type: ignore[assignment]
    __class__ = property(refuse)  # type: ignore[assignment]


def test_nothing_of_the_users_runs() -> None:
    treasure = Treasure()
    touchy = Touchy(treasure)
    with pytest.raises(AssertionError, match="the user's code ran"):
        touchy.inner  # noqa: B018
    found = list(walk({"loader": touchy}))
    assert any(thing is touchy for thing in found)
    assert any(thing is treasure for thing in found)
    attributes_of(touchy)["inner"] = None
    assert not any(thing is treasure for thing in walk(touchy)), "it was the attributes themselves, not a copy"


def test_a_variable_of_the_users_class_named_dict_is_not_taken_for_the_attributes() -> None:
    class Odd:
        __slots__ = ("__dict__",)

    odd = Odd()
    odd.inner = Treasure()  # type: ignore[attr-defined]
    assert [type(thing) for thing in walk(odd)] == [Odd, Treasure]


def test_it_ends_at_its_limit_with_the_nearest() -> None:
    far = [[[number]] for number in range(100)]
    found = list(walk([far, Treasure()], limit=20))
    assert len(found) == 20
    assert type(found[2]) is Treasure, "the nearest come first"


def test_a_long_list_of_numbers_ends_it_as_well() -> None:
    loader = Plain([list(range(10_000)), Treasure()])
    assert any(type(thing) is Treasure for thing in walk(loader, limit=20))
    looked_at = list(walk([Plain(list(range(10_000))), list(range(10_000)), [Treasure()]], limit=20))
    assert not any(type(thing) is Treasure for thing in looked_at)


def test_the_order_is_the_same_in_every_process() -> None:
    code = (
        "from tests.unit.test_walk import PLACES, Treasure, walk; "
        "print([type(t).__name__ for t in walk([make(Treasure()) for make in PLACES.values()])])"
    )
    orders = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert orders[0] == orders[1]
    assert orders[0].count("Treasure") == len(PLACES)


def test_a_container_may_change_while_it_is_walked() -> None:
    growing: dict[str, object] = {"first": Treasure()}
    for thing in walk(growing):
        growing[f"more {len(growing)}"] = thing
    assert len(growing) <= 3
