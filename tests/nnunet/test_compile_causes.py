"""Which exceptions are failures of torch.compile, with the real classes of dynamo, inductor and Triton."""

from __future__ import annotations

import ctypes.util
import inspect
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError
from torch._inductor.exc import GPUTooOldForTriton, InductorError, TritonMissing

from safeloader.nnunet.compile_causes import CompileFailure, compile_failure
from tests import compilers

triton = pytest.importorskip("triton")
OLD = SimpleNamespace(name="Quadro M6000", major=5, minor=2)
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


def wrapped(error: Exception) -> Exception:
    return BackendCompilerFailed(lambda: None, error, None)


def ptxas() -> Exception:
    from triton.runtime.errors import PTXASError

    return PTXASError("`ptxas` failed with error code 255\nptxas fatal   : Value 'sm_121a' is not defined")


def resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(262144, 101376, "shared memory")


FAILED = "torch.compile failed in the training process"


@pytest.mark.parametrize(
    ("error", "title", "evidence"),
    [
        (GPUTooOldForTriton(OLD, None), "torch.compile needs a newer GPU", "Quadro M6000"),
        (TritonMissing(None), "torch.compile found no working Triton", "Cannot find a working triton installation"),
        (InductorError(ptxas(), None), "torch.compile could not assemble the GPU's code (ptxas)", "error code 255"),
        (ptxas(), "torch.compile could not assemble the GPU's code (ptxas)", "PTXASError"),
        (wrapped(resources()), FAILED, "OutOfResources: out of resource: shared memory"),
        (InternalTorchDynamoError("a bug in dynamo"), FAILED, "a bug in dynamo"),
        (wrapped(ValueError("a bug in a backend")), FAILED, "a bug in a backend"),
    ],
    ids=["old GPU", "no Triton", "ptxas in inductor", "ptxas", "shared memory", "dynamo", "backend"],
)
def test_failures_of_the_compiler(error: Exception, title: str, evidence: str) -> None:
    failure = compile_failure(error)
    assert failure is not None
    assert failure.title == title
    assert evidence in failure.evidence
    assert "\n" not in failure.line()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(NO_MEMORY),
        wrapped(torch.OutOfMemoryError(NO_MEMORY)),
        InductorError(torch.OutOfMemoryError(NO_MEMORY), None),
        wrapped(RuntimeError("Triton Error [CUDA]: out of memory")),
        RuntimeError("CUDA error: device-side assert triggered"),
        wrapped(RuntimeError("CUDA error: an illegal memory access was encountered")),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        FileNotFoundError(2, "No such file or directory", "g++"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[-40:]}",
)
def test_what_passes_through(error: Exception) -> None:
    assert compile_failure(error) is None


def raised_by(function: Callable[[], object]) -> CompileFailure | None:
    try:
        function()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return compile_failure(error)
    raise AssertionError("it works")


def build(folder: Path, *libraries: str) -> None:
    """As Triton builds what it calls kernels by."""
    from triton.runtime import build

    source = folder / "main.c"
    source.write_text("#include <Python.h>\n")
    needed = [name for name, p in inspect.signature(build._build).parameters.items() if p.default is p.empty]
    arguments: dict[str, object] = {name: [] for name in needed}
    arguments.update(name="main", src=str(source), srcdir=str(folder), libraries=list(libraries))
    finder = getattr(build, "_find_compiler", None)
    if hasattr(finder, "cache_clear"):
        finder.cache_clear()
    build._build(**arguments)


def test_tritons_own_search_for_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    none = raised_by(lambda: build(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    named = raised_by(lambda: build(tmp_path))
    for failure in (none, named):
        assert failure is not None and failure.title == "torch.compile found no C or C++ compiler"
    assert "Failed to find C compiler" in none.evidence  # type: ignore[union-attr]
    assert "FileNotFoundError" in named.evidence  # type: ignore[union-attr]


def without_assembler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("CC", shutil.which("gcc") or "gcc")
    monkeypatch.setenv("PATH", str(folder))
    return []


def without_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    compilers.without_headers(folder)
    monkeypatch.setenv("CC", str(folder / "gcc"))
    return []


def without_libcuda(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    if ctypes.util.find_library("cuda"):
        pytest.skip("libcuda.so is here")
    monkeypatch.setenv("CC", shutil.which("gcc") or "gcc")
    return ["cuda"]


@pytest.mark.parametrize(
    ("broken", "title", "evidence"),
    [
        (without_assembler, "torch.compile found no C or C++ compiler", "cannot execute"),
        (without_headers, "torch.compile found no Python headers (Python.h)", "Python.h: No such file"),
        (without_libcuda, "torch.compile could not link with libcuda.so", "cannot find -lcuda"),
    ],
)
def test_what_the_compiler_said_to_the_console_only(
    broken: Callable[[Path, pytest.MonkeyPatch], list[str]],
    title: str,
    evidence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    libraries = broken(tmp_path, monkeypatch)
    failure = raised_by(lambda: build(tmp_path, *libraries))
    assert failure is not None and failure.title == title
    assert evidence in failure.evidence and "\n" not in failure.line()
