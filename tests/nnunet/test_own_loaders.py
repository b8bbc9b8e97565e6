"""Trainers that build their loaders in their own way get ours; what can't be replaced is said loudly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from safeloader import SafeAugmenter, SafeMultiThreadedAugmenter
from safeloader.nnunet.loaders import OURS, LoaderFactory, adopted
from safeloader.nnunet.mixin import SafeLoaderMixin
from tests.loaders import RandomLoader
from tests.nnunet.conftest import MakeTrainer
from tests.nnunet.test_named import upstream_trainers

STOCK = "batchgenerators.dataloading.nondet_multi_threaded_augmenter"

WAYS = {
    "by its name": f"""
from {STOCK} import NonDetMultiThreadedAugmenter
def build(loader):
    return NonDetMultiThreadedAugmenter(loader, None, 1, num_cached=3)
""",
    "under an alias": f"""
from {STOCK} import NonDetMultiThreadedAugmenter as NDMTA
def build(loader):
    return NDMTA(loader, None, num_processes=1, num_cached=3)
""",
    "by its module": f"""
import {STOCK} as m
def build(loader):
    return m.NonDetMultiThreadedAugmenter(data_loader=loader, transform=None, num_processes=1, num_cached=3)
""",
    "imported late": f"""
def build(loader):
    from {STOCK} import NonDetMultiThreadedAugmenter
    return NonDetMultiThreadedAugmenter(loader, None, 1, 3)
""",
    "with some arguments given before": f"""
from functools import partial
from {STOCK} import NonDetMultiThreadedAugmenter
make = partial(NonDetMultiThreadedAugmenter, num_processes=1, num_cached=3)
def build(loader):
    return make(loader, None)
""",
    "an attribute of a class": f"""
from {STOCK} import NonDetMultiThreadedAugmenter
class Settings:
    augmenter = NonDetMultiThreadedAugmenter
def build(loader):
    return Settings.augmenter(loader, None, 1, 3)
""",
}

DERIVED = f"""
from {STOCK} import NonDetMultiThreadedAugmenter
class MyAugmenter(NonDetMultiThreadedAugmenter):
    pass
def build(loader):
    return MyAugmenter(loader, None, 1, 3)
"""

IN_TURN = """
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
def build(loader):
    return MultiThreadedAugmenter(loader, None, 1, 2, seeds=[7], timeout=20)
"""


def users_module(source: str) -> dict[str, Any]:
    """Nnu-Net drops a user's modules from `sys.modules` after its search: only their functions still know them."""
    namespace: dict[str, Any] = {"__name__": "users_helper"}
    exec(source, namespace)
    return namespace


@pytest.fixture
def trainer_with(tmp_path: Path) -> Callable[[str], Any]:
    """Makes a trainer on stand-ins for nnU-Net's, whose `get_dataloaders` calls a helper in a user's module."""

    def make(source: str) -> Any:
        build = users_module(source)["build"]

        class Base:
            output_folder = str(tmp_path)
            local_rank = current_epoch = 0
            is_ddp = False

            def get_dataloaders(self) -> tuple[Any, Any]:
                return build(RandomLoader()), build(RandomLoader())

            def print_to_log_file(self, *lines: object) -> None:
                self.log.extend(map(str, lines))

        class Safe(SafeLoaderMixin, Base):
            pass

        trainer: Any = Safe()
        trainer.log = []
        return trainer

    return make


@pytest.mark.parametrize("way", WAYS)
def test_both_loaders_are_ours_whatever_name_the_trainer_has_for_the_stock_class(
    way: str, trainer_with: Callable[[str], Any]
) -> None:
    trainer = trainer_with(WAYS[way])
    loaders = trainer.get_dataloaders()
    assert [type(loader) for loader in loaders] == [SafeAugmenter, SafeAugmenter]
    assert [(loader.num_processes, loader.num_cached) for loader in loaders] == [(1, 3), (1, 3)]
    assert [loader.options.name for loader in loaders] == ["train", "val"]
    assert [loader.options.stream for loader in loaders] == [0, 1]
    assert not [line for line in trainer.log if "WARNING" in line]


def test_the_class_that_gives_batches_in_turn_becomes_ours_of_that_kind(trainer_with: Callable[[str], Any]) -> None:
    trainer = trainer_with(IN_TURN)
    loaders = trainer.get_dataloaders()
    assert [type(loader) for loader in loaders] == [SafeMultiThreadedAugmenter] * 2
    assert [(loader.seeds, loader.num_cached_per_queue, loader.timeout) for loader in loaders] == [([7], 2, 20)] * 2
    assert trainer._safeloader.states() is None, "a finite loader's epoch begins anew"


def test_batches_come_from_a_worker_of_ours(trainer_with: Callable[[str], Any]) -> None:
    train, _ = trainer_with(WAYS["under an alias"]).get_dataloaders()
    with train:
        next(train)
        assert [worker.pid is not None for worker in train.workers()] == [True]


def test_a_derived_class_is_left_alone_and_that_is_said_loudly(trainer_with: Callable[[str], Any]) -> None:
    trainer = trainer_with(DERIVED)
    train, _ = trainer.get_dataloaders()
    assert isinstance(train, NonDetMultiThreadedAugmenter)
    assert not isinstance(train, SafeAugmenter)
    assert (train.num_processes, train.num_cached) == (1, 3)
    assert trainer.log == [
        "SafeLoader: WARNING: the loaders of this trainer can't be replaced by SafeLoader's: users_helper.MyAugmenter. "
        "The first of its workers that dies will end the training, as without SafeLoader. What to do: in the trainer, "
        "use NonDetMultiThreadedAugmenter itself or safeloader.SafeAugmenter instead."
    ]


def test_afterwards_the_stock_classes_make_stock_objects(trainer_with: Callable[[str], Any]) -> None:
    before = [stock.__dict__["__init__"] for stock in OURS]
    trainer_with(WAYS["by its name"]).get_dataloaders()
    with pytest.raises(KeyError), adopted(LoaderFactory(0, 1, "", 0).adopt):
        raise KeyError
    assert [stock.__dict__["__init__"] for stock in OURS] == before
    made = MultiThreadedAugmenter(RandomLoader(), None, 1), NonDetMultiThreadedAugmenter(RandomLoader(), None, 1)
    assert [type(augmenter) for augmenter in made] == [MultiThreadedAugmenter, NonDetMultiThreadedAugmenter]


def test_where_ours_runs_the_stock_class_itself_it_is_not_adopted_again(
    trainer_with: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    train, _ = trainer_with(IN_TURN).get_dataloaders()
    assert type(train) is SafeMultiThreadedAugmenter
    assert type(train._stock) is MultiThreadedAugmenter


def test_a_trainer_without_loaders_has_nothing_to_protect(trainer_with: Callable[[str], Any]) -> None:
    """As nnU-Net's nnUNetTrainerBenchmark_5epochs_noDataLoading."""
    trainer = trainer_with("def build(loader): return None")
    assert trainer.get_dataloaders() == (None, None)
    assert trainer.log == []
    trainer._end_report("finished")
    assert trainer.log == ["SafeLoader: batches were made without SafeLoader's workers"]


def test_nnunets_trainers_build_their_loaders_in_ways_that_are_tested_here(nnunet: ModuleType) -> None:
    ways = {trainer.get_dataloaders.__qualname__ for trainer in upstream_trainers()}  # type: ignore[attr-defined]
    assert ways == {
        "nnUNetTrainer.get_dataloaders",
        "nnUNetTrainerBenchmark_5epochs_noDataLoading.get_dataloaders",
    }


def test_a_trainer_that_is_built_by_name_has_our_loaders_and_its_own_transforms(
    nnunet: ModuleType, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = make_trainer(nnunet.nnUNetTrainerSafeLoader_DA5)
    loaders = trainer.get_dataloaders()
    assert [type(loader) for loader in loaders] == [SafeAugmenter, SafeAugmenter]
    transforms = {type(t).__name__ for t in walk_transforms(loaders[0].generator.transforms)}
    assert "BrightnessGradientAdditiveTransform" in transforms, "DA5's own"


def walk_transforms(transform: Any) -> Iterator[Any]:
    """A transform and all that are in it."""
    yield transform
    inner = [getattr(transform, "transform", None), *getattr(transform, "transforms", ())]
    for part in inner:
        if part is not None:
            yield from walk_transforms(part)
