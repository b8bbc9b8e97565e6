"""SafeLoader before any trainer, by name: found by nnU-Net's own search, in this process and in others."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import pickle
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from safeloader.errors import ConfigError
from safeloader.nnunet.install import SHIM_FOLDER
from safeloader.nnunet.mixin import SafeLoaderMixin, checkpoint_trainer_name
from safeloader.nnunet.named import base_names
from tests.nnunet.conftest import MakeTrainer

USERS = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class MyTrainer(nnUNetTrainer):
    pass


class My_Trainer(nnUNetTrainer):
    pass


class MyNetworkTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(*args):
        return nnUNetTrainer.build_network_architecture(*args)


class MyWrittenSafeLoader(nnUNetTrainer):
    pass


class MyWritten(nnUNetTrainer):
    pass
"""


@pytest.fixture
def find(nnunet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nnu-Net's own search; the shim is in the first of its folders, a user's trainers are in the second."""
    (tmp_path / "users_trainers.py").write_text(USERS)
    monkeypatch.setenv("nnUNet_extTrainer", f"{SHIM_FOLDER}{os.pathsep}{tmp_path}")
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    def quietly(name: str) -> type:
        with redirect_stdout(io.StringIO()):
            found: type = recursive_find_trainer_class_by_name(name)
            return found

    return quietly


@pytest.mark.parametrize(
    ("asked", "bases"),
    [
        ("nnUNetTrainerSafeLoader_250epochs", ("nnUNetTrainer_250epochs", "nnUNetTrainer250epochs")),
        ("nnUNetTrainerSafeLoaderDA5", ("nnUNetTrainerDA5", "nnUNetTrainer_DA5")),
        ("nnUNetTrainerDA5SafeLoader", ("nnUNetTrainerDA5",)),
        ("SafeLoader_MyTrainer", ("_MyTrainer", "MyTrainer")),
        ("MyTrainer_SafeLoader", ("MyTrainer_", "MyTrainer")),
        ("A_SafeLoader_B", ("A__B", "A_B", "AB")),
        ("ASafeLoaderSafeLoader", ("ASafeLoader", "A_SafeLoader")),
        ("SafeLoader", ()),
    ],
)
def test_the_names_of_the_base_in_their_order(asked: str, bases: tuple[str, ...]) -> None:
    assert base_names(asked) == bases


def upstream_trainers() -> list[type]:
    """Each trainer class that nnU-Net ships, by looking through its modules."""
    import importlib
    import pkgutil

    import nnunetv2.training.nnUNetTrainer
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    package = nnunetv2.training.nnUNetTrainer
    found: dict[str, type] = {}
    for _, name, is_package in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not is_package:
            members = inspect.getmembers(importlib.import_module(name), inspect.isclass)
            found.update({cls.__name__: cls for _, cls in members if issubclass(cls, nnUNetTrainer)})
    return list(found.values())


def test_each_trainer_of_nnunets_is_found_with_safeloader_behind_its_name(
    nnunet: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    trainers = upstream_trainers()
    assert len(trainers) > 50
    for base in trainers:
        found = getattr(nnunet, base.__name__ + "SafeLoader")
        assert found.__bases__ == (SafeLoaderMixin, base)
        assert checkpoint_trainer_name(found) == base.__name__


@pytest.mark.parametrize(
    ("asked", "base"),
    [
        ("nnUNetTrainerSafeLoader_250epochs", "nnUNetTrainer_250epochs"),
        ("nnUNetTrainerSafeLoader_NoMirroring", "nnUNetTrainerNoMirroring"),
        ("nnUNetTrainerSafeLoader_DA5", "nnUNetTrainerDA5"),
        ("nnUNetTrainerSafeLoader_CELoss", "nnUNetTrainerCELoss"),
        ("nnUNetTrainerSafeLoaderDiceCELoss_noSmooth", "nnUNetTrainerDiceCELoss_noSmooth"),
        ("nnUNetTrainerSafeLoaderonlyMirror01", "nnUNetTrainer_onlyMirror01"),
        ("MyTrainerSafeLoader", "MyTrainer"),
        ("SafeLoader_MyTrainer", "MyTrainer"),
        ("My_SafeLoaderTrainer", "My_Trainer"),
    ],
)
def test_irregular_names_and_users_own(find: Any, asked: str, base: str) -> None:
    found = find(asked)
    assert found.__name__ == asked
    assert [cls.__name__ for cls in found.__bases__] == ["SafeLoaderMixin", base]
    assert checkpoint_trainer_name(found) == base
    assert find(asked) is found, "always the same class"


def test_ours_by_its_own_name_is_the_class_in_the_module(find: Any, nnunet: ModuleType) -> None:
    assert find("nnUNetTrainerSafeLoader") is nnunet.nnUNetTrainerSafeLoader


def test_a_name_that_may_mean_two_is_refused_and_both_spellings_are_given(find: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"-tr My_SafeLoader_Trainer may mean My_Trainer or MyTrainer, and nnU-Net has both: write "
        r"My_TrainerSafeLoader or MyTrainerSafeLoader$",
    ):
        find("My_SafeLoader_Trainer")
    assert find("My_TrainerSafeLoader").__bases__[1].__name__ == "My_Trainer"


def test_a_class_that_the_user_has_written_is_not_hidden_by_ours(find: Any) -> None:
    found = find("MyWrittenSafeLoader")
    assert found.__module__ == "users_trainers"
    assert not issubclass(found, SafeLoaderMixin)


def test_a_network_of_the_users_keeps_the_users_name_in_checkpoints(find: Any) -> None:
    assert checkpoint_trainer_name(find("MyNetworkTrainerSafeLoader")) == "MyNetworkTrainer"


def test_one_that_has_safeloader_already_is_taken_as_it_is(find: Any, nnunet: ModuleType) -> None:
    assert find("nnUNetTrainerSafeLoaderSafeLoader") is nnunet.nnUNetTrainerSafeLoader


def test_an_unknown_name_ends_with_nnunets_error_after_one_line_of_ours(
    find: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        find("nnUNetTrainerSafeLoader_NoMiroring")
    assert [record.message.partition(", nnUNetTrainer_DAS")[0] for record in caplog.records] == [
        "SafeLoader: -tr nnUNetTrainerSafeLoader_NoMiroring stands for SafeLoader before the trainer "
        "nnUNetTrainer_NoMiroring or nnUNetTrainerNoMiroring, and nnU-Net finds no trainer of that name. Similar ones: "
        "nnUNetTrainerNoMirroring (-tr nnUNetTrainerNoMirroringSafeLoader)"
    ]


def test_an_error_in_a_users_module_is_the_users(find: Any, tmp_path: Path) -> None:
    (tmp_path / "a_broken.py").write_text("raise RuntimeError('no licence')\n")
    with pytest.raises(RuntimeError, match=r"^no licence$"):
        find("MyTrainerSafeLoader_of_a_broken_folder")


def test_other_names_are_not_our_business(nnunet: ModuleType) -> None:
    with pytest.raises(AttributeError, match=r"module 'safeloader.nnunet.trainer' has no attribute 'nnUNetTrainerDA6'"):
        _ = nnunet.nnUNetTrainerDA6


def test_a_checkpoint_predicts_with_nnunets_own_class(
    nnunet: ModuleType, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    trainer = make_trainer(nnunet.nnUNetTrainerSafeLoader_NoMirroring)
    folder = Path(trainer.output_folder_base)
    assert folder.name == "nnUNetTrainerSafeLoader_NoMirroring__nnUNetPlans__3d_small"
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    assert predictor.trainer_name == "nnUNetTrainerNoMirroring"


RANK = """
import pickle, sys
cls = pickle.load(sys.stdin.buffer)
print(cls.__name__, *(base.__name__ for base in cls.__bases__))
"""


def test_another_process_builds_the_same_class(find: Any) -> None:
    """As a rank that nnU-Net's `-num_gpus` spawns: nothing of this process is in it but the environment."""
    pickled = pickle.dumps(find("MyTrainerSafeLoader"))
    assert pickle.loads(pickled) is find("MyTrainerSafeLoader")
    rank = subprocess.run([sys.executable, "-c", RANK], input=pickled, capture_output=True, check=True, timeout=120)
    assert rank.stdout.decode().split() == ["MyTrainerSafeLoader", "SafeLoaderMixin", "MyTrainer"]
