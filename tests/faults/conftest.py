"""What several fault tests need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeloader.testing import wait_until


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup (v1) of 2 GiB."""
    cgroup = Path("/sys/fs/cgroup/memory") / f"safeloader-test-{os.getpid()}"
    try:
        cgroup.mkdir()
        (cgroup / "memory.limit_in_bytes").write_text(str(2 << 30))
    except OSError as error:
        pytest.skip(f"needs a memory cgroup (v1) that this user may create: {error}")
    yield cgroup
    wait_until(lambda: not (cgroup / "cgroup.procs").read_text())
    cgroup.rmdir()
