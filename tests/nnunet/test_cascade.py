"""Where a cascade looks for its first stage's predictions, on a stand-in for nnU-Net's trainer."""

from __future__ import annotations

from pathlib import Path

import torch

from safeloader.nnunet.mixin import SafeLoaderMixin

DATASET = "Dataset001_Brain"
NEXT = "3d_cascade_fullres"


class Base:
    device = torch.device("cpu")
    network = loss = None

    def __init__(self, results: Path, previous_stage: str | None) -> None:
        self.was_initialized = False
        self.log: list[str] = []
        self.seen_by_nnunet: str | None = None
        self.folder_with_segs_from_previous_stage = (
            None if previous_stage is None else str(predictions(results, type(self).__name__))
        )

    @staticmethod
    def build_network_architecture() -> None: ...

    def initialize(self) -> None:
        self.was_initialized = True
        self.seen_by_nnunet = self.folder_with_segs_from_previous_stage

    def print_to_log_file(self, *lines: object) -> None:
        self.log += map(str, lines)


class BaseSafe(SafeLoaderMixin, Base):
    pass


def predictions(results: Path, trainer: str) -> Path:
    return results / DATASET / f"{trainer}__nnUNetPlans__3d_lowres" / "predicted_next_stage" / NEXT


def _predict(results: Path, trainer: str) -> Path:
    folder = predictions(results, trainer)
    folder.mkdir(parents=True)
    (folder / "case.b2nd").touch()
    return folder


def test_the_stock_trainers_are_found(tmp_path: Path) -> None:
    stock = _predict(tmp_path, "Base")
    predictions(tmp_path, "BaseSafe").mkdir(parents=True)  # and nothing in it
    trainer = BaseSafe(tmp_path, "3d_lowres")
    trainer.initialize()
    assert trainer.seen_by_nnunet == str(stock)
    assert trainer.log == [f"SafeLoader: the predictions of 3d_lowres are those of Base: {stock}"]
    trainer.initialize()
    assert len(trainer.log) == 1


def test_ours_come_first(tmp_path: Path) -> None:
    _predict(tmp_path, "Base")
    own = _predict(tmp_path, "BaseSafe")
    trainer = BaseSafe(tmp_path, "3d_lowres")
    trainer.initialize()
    assert trainer.seen_by_nnunet == str(own)
    assert trainer.log == []


def test_without_any_it_says_what_to_run(tmp_path: Path) -> None:
    trainer = BaseSafe(tmp_path, "3d_lowres")
    trainer.initialize()
    own, base = predictions(tmp_path, "BaseSafe"), predictions(tmp_path, "Base")
    assert trainer.seen_by_nnunet == str(own)
    assert trainer.log == [
        f"SafeLoader: this cascade needs the predictions of 3d_lowres, and there are none in {own} or {base}: run "
        f"nnUNetv2_train {DATASET} 3d_lowres FOLD -tr BaseSafe for all folds first"
    ]


def test_another_configuration_has_none(tmp_path: Path) -> None:
    trainer = BaseSafe(tmp_path, None)
    trainer.initialize()
    assert trainer.seen_by_nnunet is None and trainer.log == []
