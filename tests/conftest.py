"""Every test leaves the process as it found it: no child, descriptor, thread or mapping of ours stays behind."""

from __future__ import annotations

import gc
import mmap
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.pool.consumer import Consumer
from safeloader.pool.supervisor import Supervisor
from safeloader.testing import wait_until
from tests.loaders import RandomLoader
from tests.processes import open_files

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script: what the tests start would ignore Ctrl-C as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _descriptors() -> Counter[str]:
    return Counter(file.partition(":[")[0] for file in open_files())


def _mappings() -> Counter[str]:
    return Counter(re.findall(r"memfd:(safeloader\S*)", Path("/proc/self/maps").read_text()))


def _holders() -> list[str]:
    """Who refers to what our memory is seen through: what to look at when a mapping stays."""
    seen = [thing for thing in gc.get_objects() if type(thing) in (mmap.mmap, memoryview, Consumer)]
    return [
        f"{type(thing).__name__} <- {type(r).__name__} {str(r)[:200]}"
        for thing in seen
        for r in gc.get_referrers(thing)
    ]


@pytest.fixture(scope="module", autouse=True)
def _only_what_is_new_is_collected() -> None:
    """What is there before a module's first test is kept out of later collections.

    With torch and nnU-Net these are half a million objects. To walk them took a third of a second, after each test.
    """
    gc.collect()  # first: what is frozen as garbage stays for ever
    gc.freeze()


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    children, threads, descriptors = _children(), set(threading.enumerate()), _descriptors()
    mappings = _mappings()
    in_shm = set(os.listdir("/dev/shm"))
    yield

    def left() -> dict[str, object]:
        gc.collect()
        found: dict[str, object] = {
            "children": _children() - children,
            "threads": {t for t in threading.enumerate() if t.is_alive()} - threads,
            "descriptors": _descriptors() - descriptors,
            "mappings": _mappings() - mappings,
            "/dev/shm": {name for name in set(os.listdir("/dev/shm")) - in_shm if "safeloader" in name},
        }
        return {what: value for what, value in found.items() if value}

    try:
        wait_until(lambda: not left(), timeout_s=5)
    except TimeoutError:
        pytest.fail(f"left behind: {left()}\n" + "\n".join(_holders()))


@pytest.fixture(scope="module")
def warm_nursery() -> Iterator[None]:
    """A clean nursery that all tests of the module share: starting one takes seconds."""
    with Supervisor.hold():
        with SafeAugmenter(RandomLoader(), None, 1, 1) as augmenter:
            next(augmenter)
        yield
