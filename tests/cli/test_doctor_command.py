"""`safeloader doctor` where something is really broken: torch that crashes, no nnU-Net, few CPUs, a small /dev/shm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import safeloader
from safeloader.nnunet.install import SHIM_FOLDER

PACKAGE = Path(safeloader.__file__).parents[1]


def fake(folder: Path, name: str, text: str) -> None:
    """A package that is imported in place of the installed one."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def doctor(
    *before: str, modules: Path | None = None, deep: bool = False, **environ: str
) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
    """Its exit code, findings by check, and all that it printed as JSON; `before` is what starts it."""
    path = os.pathsep.join(str(folder) for folder in (modules, PACKAGE) if folder is not None)
    done = subprocess.run(
        [*before, sys.executable, "-m", "safeloader", "doctor", "--json", *(["--deep"] if deep else [])],
        env={**os.environ, "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "Traceback" not in done.stderr
    printed = json.loads(done.stdout)
    return done.returncode, {check["check"]: check for check in printed["checks"]}, printed


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """An environment whose torch is broken, and that has no pip: so nothing takes long."""
    modules = tmp_path / "modules"
    fake(modules, "torch", "raise ImportError('libcudart.so.12: cannot open shared object file')")
    fake(modules, "pip", "")
    (modules / "pip" / "__main__.py").write_text("import sys; sys.exit('No module named pip')")
    return modules


def test_torch_that_can_not_be_imported(broken: Path) -> None:
    code, checks, printed = doctor(modules=broken)
    assert code == 1 and printed["breaks"] is True
    assert checks["torch"] == {
        "check": "torch",
        "verdict": "breaks",
        "evidence": "can't be imported: ImportError: libcudart.so.12: cannot open shared object file",
        "remedy": "pip install --force-reinstall torch",
    }
    assert checks["blosc2"]["verdict"] == "ok"  # the next step is taken all the same
    assert checks["dependencies"]["verdict"] == "unknown"


def test_torch_that_crashes_the_process(tmp_path: Path) -> None:
    fake(tmp_path, "torch", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    code, checks, _ = doctor(modules=tmp_path)
    assert code == 1
    assert checks["torch"]["evidence"] == "can't be imported: the process that tried it was killed by SIGSEGV"
    assert checks["trainer"]["evidence"] == "nnU-Net can't be imported: the process that tried it was killed by SIGSEGV"


def test_torch_that_hangs(tmp_path: Path) -> None:
    fake(tmp_path, "torch", "import signal; signal.pause()")
    _, checks, _ = doctor(modules=tmp_path)
    for library in ("torch", "blosc2"):  # on slow storage it takes as long, and the training runs
        assert checks[library]["verdict"] == "unknown"
        assert checks[library]["evidence"].startswith(f"whether {library} can be imported: it took more than 8 s; ")


def test_nnunet_that_can_not_be_imported(broken: Path) -> None:
    fake(broken, "nnunetv2", "raise ImportError('cannot import name x from batchgenerators')")
    _, checks, _ = doctor(modules=broken)
    assert checks["trainer"]["verdict"] == "breaks"
    assert checks["trainer"]["evidence"] == (
        "nnU-Net can't be imported: ImportError: cannot import name x from batchgenerators"
    )


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs")
def test_cpu_affinity(broken: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    _, checks, _ = doctor("taskset", "-c", str(cpu), modules=broken, nnUNet_n_proc_DA="6")
    assert checks["CPUs"]["evidence"] == (
        f"CPU affinity allows 1 of {os.cpu_count()} CPUs; nnUNet_n_proc_DA asks for 6 workers, and SafeLoader starts 1"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_small_shm_and_a_read_only_folder(broken: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    mount = f'mount -t tmpfs -o size=64m tmpfs /dev/shm && mount -t tmpfs -o ro,size=1m tmpfs "{results}" && exec "$@"'
    code, checks, _ = doctor(
        *("unshare", "-m", "sh", "-c", mount, "sh"),
        modules=broken,
        nnUNet_results=str(results),
        nnUNet_preprocessed=str(tmp_path),
    )
    assert code == 1
    assert checks["/dev/shm"]["verdict"] == "note"
    assert checks["/dev/shm"]["evidence"].startswith("64 MiB, 64 MiB free")
    assert checks["folders"]["evidence"] == f"nothing can be written to nnUNet_results={results}: Read-only file system"


def test_limits_of_the_shell(broken: Path) -> None:
    _, checks, _ = doctor("sh", "-c", 'ulimit -n 100 && exec "$@"', "sh", modules=broken)
    assert checks["open files"]["evidence"] == "only 100 at a time"


def test_a_good_installation(tmp_path: Path) -> None:
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
    code, checks, printed = doctor(
        nnUNet_preprocessed=str(tmp_path / "nnUNet_preprocessed"),
        nnUNet_results=str(tmp_path / "nnUNet_results"),
        nnUNet_extTrainer=str(SHIM_FOLDER),
        deep=True,  # on a busy machine the imports take longer than the 8 s that it has without
    )
    assert code == (1 if printed["breaks"] else 0)
    assert checks["folders"]["evidence"].startswith("they are there; ")
    assert checks["torch"]["verdict"] in ("ok", "note")
    assert checks["dependencies"]["verdict"] == "ok"
    assert checks["trainer"]["verdict"] == "ok"
    assert checks["torch.compile"]["verdict"] in ("ok", "warning")  # without a compiler, the latter
    assert not list(tmp_path.rglob("*.*"))  # what was tried in the folders is gone


def test_for_a_person(broken: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "safeloader", "doctor"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(broken), str(PACKAGE)]), "COLUMNS": "90"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == ""
    said = next(
        number for number, line in enumerate(lines) if line.startswith("  FAIL  torch          can't be imported")
    )
    assert "cannot open shared object file" in " ".join(" ".join(lines[said : said + 2]).split())
    assert lines[said + 2] == f"{'':<23}-> pip install --force-reinstall torch"
    assert max(len(line) for line in lines if "->" not in line) < 90
    assert "will break a training" in lines[-1]
