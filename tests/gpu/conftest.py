"""The same checks as everywhere, but for descriptors: CUDA opens some of its own when it likes."""

from __future__ import annotations

import gc
import subprocess
import threading
from collections.abc import Iterator

import pytest

from safeloader.nnunet.brain import DATASET_NAME, write_dataset
from safeloader.nnunet.workspace import Workspace
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


@pytest.fixture(scope="session")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A small dataset, preprocessed, with the configuration `3d_small`."""
    workspace = Workspace(tmp_path_factory.mktemp("brain"), DATASET_NAME)
    write_dataset(workspace.raw, cases=5, resolution_mm=6)
    subprocess.run(workspace.preprocess_command(), env=workspace.environment(), check=True, timeout=240)
    workspace.add_small_configuration(patch=(24, 32, 24), features=(4, 8, 16))
    return workspace
