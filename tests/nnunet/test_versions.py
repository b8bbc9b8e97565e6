"""Too old an nnU-Net is refused by name and version, before anything else happens."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from safeloader.cli import main
from safeloader.errors import ConfigError
from safeloader.nnunet.mixin import SafeLoaderMixin
from safeloader.nnunet.versions import refuse_old


@pytest.mark.parametrize("version", ["2.5", "2.5.2", "2.10.0", "3.0.0rc1", "unknown"])
def test_new_ones_and_those_that_nobody_knows_may_start(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"nnunetv2": version}[name])
    refuse_old()


def test_a_folder_without_a_version_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    refuse_old()


def test_an_old_one_is_refused_by_the_trainer_and_by_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Base:
        def initialize(self) -> None:
            raise AssertionError("the training would start")

    class Safe(SafeLoaderMixin, Base): ...

    monkeypatch.setattr(metadata, "version", lambda name: "2.4.2")
    trainer: Any = Safe()
    said = (
        "nnunetv2 2.4.2 is installed, and SafeLoader needs 2.5 or later: `pip install -U nnunetv2`, or train with a "
        "trainer that has no SafeLoader in its name"
    )
    with pytest.raises(ConfigError) as refused:
        trainer.initialize()
    assert str(refused.value) == said
    assert main(["install"]) != 0
    assert capsys.readouterr().err.strip().endswith(said)
