"""The same checks as everywhere, but for descriptors: CUDA opens some of its own when it likes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from safeloader.testing import wait_until
from tests.conftest import _children, _mappings


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    children, threads, mappings = _children(), set(threading.enumerate()), _mappings()
    yield

    def is_left() -> bool:
        gc.collect()
        alive = {thread for thread in threading.enumerate() if thread.is_alive()}
        return bool(_children() - children or alive - threads or _mappings() - mappings)

    wait_until(lambda: not is_left(), timeout_s=5, what="that no child, thread or mapping is left")
