"""Nnu-Net finds our trainer: by the shim in its own folder, and by the environment variable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from safeloader.errors import ConfigError
from safeloader.nnunet import install as module
from safeloader.nnunet.install import SHIM_FOLDER, Outcome, export_line, install, uninstall, variants_folder

FIND = """
import sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
for name in sys.argv[1:]:
    found = find(name)
    print("found", found.__module__, *(base.__name__ for base in found.__bases__))
"""


@pytest.fixture
def nnunet_copy(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python finds a copy of nnU-Net, to write into."""
    spec = find_spec("nnunetv2")
    assert spec is not None
    assert spec.submodule_search_locations
    shutil.copytree(spec.submodule_search_locations[0], tmp_path / "site" / "nnunetv2")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])
    return {**os.environ, "PYTHONPATH": path}


def python(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


def test_the_command_makes_nnunet_find_the_trainer(nnunet_copy: dict[str, str], tmp_path: Path) -> None:
    done = python(["-m", "safeloader", "install"], nnunet_copy)
    shim = tmp_path / "site/nnunetv2/training/nnUNetTrainer/variants/safeloader_trainer.py"
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Written: {shim}\n")
    found = python(["-c", FIND, "nnUNetTrainerSafeLoader", "nnUNetTrainerSafeLoader_DA5"], nnunet_copy)
    assert found.stdout.splitlines()[-2:] == [
        "found safeloader.nnunet.trainer SafeLoaderMixin nnUNetTrainer",
        "found safeloader.nnunet.trainer SafeLoaderMixin nnUNetTrainerDA5",
    ], found.stderr


def test_a_shim_that_outlives_safeloader_breaks_no_other_trainer(nnunet_copy: dict[str, str], tmp_path: Path) -> None:
    install(tmp_path / "site/nnunetv2/training/nnUNetTrainer/variants")
    gone = "import sys; sys.modules['safeloader'] = None\n"
    found = python(["-c", gone + FIND, "nnUNetTrainerNoMirroring", "nnUNetTrainerSafeLoader"], nnunet_copy)
    assert "found nnunetv2." in found.stdout
    assert "No module named 'safeloader" in found.stderr.splitlines()[-1]


def test_the_environment_variable_works_by_itself() -> None:
    found = python(["-c", FIND, "nnUNetTrainerSafeLoader"], {**os.environ, "nnUNet_extTrainer": str(SHIM_FOLDER)})
    assert found.stdout.splitlines()[-1].startswith("found safeloader.nnunet.trainer "), found.stderr


def test_the_printed_line_sets_the_variable_and_keeps_what_was_there() -> None:
    for before, after in (({}, str(SHIM_FOLDER)), ({"nnUNet_extTrainer": "/mine"}, f"{SHIM_FOLDER}:/mine")):
        shell = subprocess.run(
            ["sh", "-c", f"{export_line()}; printenv nnUNet_extTrainer"], env={"PATH": os.environ["PATH"], **before},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert shell.stdout.strip() == after


def test_install_is_idempotent_and_undone_by_uninstall(tmp_path: Path) -> None:
    outcomes = [install(tmp_path).outcome, install(tmp_path).outcome]
    (tmp_path / "safeloader_trainer.py").write_text("# of an older SafeLoader\n")
    outcomes += [install(tmp_path).outcome, uninstall(tmp_path).outcome, uninstall(tmp_path).outcome]
    assert outcomes == [Outcome.WRITTEN, Outcome.UNCHANGED, Outcome.REPLACED, Outcome.REMOVED, Outcome.ABSENT]
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(module.os, "replace", refuse)
    change = install(tmp_path)
    assert (change.outcome, change.reason) == (Outcome.READ_ONLY, "Read-only file system")
    assert list(tmp_path.iterdir()) == []


def test_without_nnunet_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="nnU-Net is not installed for this Python: pip install nnunetv2"):
        variants_folder()
