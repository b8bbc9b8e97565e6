"""The loader that nnU-Net itself would train with, taken from a dataset: for commands that look at it.

nnU-Net's own trainer builds it. Nothing is trained, and nothing is written into `nnUNet_results`.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from safeloader.errors import ConfigError
from safeloader.nnunet.loaders import AUGMENTER, namespaces, replaced
from safeloader.pool.work import Work


class _Taken:
    """Stands for the augmenter class while nnU-Net builds its loaders, and takes what they would be made of."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def __call__(self, data_loader: Any, transform: Any, *_: Any, **__: Any) -> Iterator[None]:
        self.works.append(Work(data_loader, transform))
        return iter([None])  # nnU-Net draws one batch, and drops it


def training_loader(dataset: str, configuration: str, fold: int, plans: str, trainer: str) -> Work:
    """The loader and transforms of a training.

    Args:
        dataset: its number or name.
        configuration: for example `3d_fullres`.
        fold: which.
        plans: the plans' identifier.
        trainer: the trainer's class name.

    Raises:
        ConfigError: nnU-Net is missing, or does not find one of these.
    """
    try:
        from nnunetv2.run.run_training import get_trainer_from_args
    except ImportError as error:
        raise ConfigError(f"nnU-Net can't be imported ({error}): `pip install nnunetv2`") from error
    asked = f"-d {dataset} -c {configuration} -f {fold} -p {plans} -tr {trainer}"
    printed = io.StringIO()
    with _results_nowhere(), contextlib.redirect_stdout(printed):
        try:
            built = get_trainer_from_args(
                dataset, configuration, fold, trainer_name=trainer, plans_identifier=plans, device=torch.device("cpu")
            )
            built.initialize()
        except (RuntimeError, OSError, ValueError, KeyError, AssertionError, TypeError) as error:
            raise ConfigError(f"nnU-Net does not find {asked}: {_first_line(error)}") from error
        return _taken_from(built, asked)


def _taken_from(trainer: Any, asked: str) -> Work:
    taken = _Taken()
    with contextlib.ExitStack() as stack:
        for namespace in namespaces(type(trainer)):
            stack.enter_context(replaced(namespace, {AUGMENTER: taken}))
        stack.enter_context(_workers_allowed())
        try:
            trainer.get_dataloaders()
        except (OSError, ValueError, KeyError, AssertionError) as error:
            raise ConfigError(f"nnU-Net can't make loaders for {asked}: {_first_line(error)}") from error
    if not taken.works:
        raise ConfigError(f"trainer {trainer.__class__.__name__} builds its loaders in a way of its own")
    return taken.works[0]


@contextmanager
def _results_nowhere() -> Iterator[None]:
    """A trainer makes its output folder and a log as soon as it exists."""
    with tempfile.TemporaryDirectory(prefix="safeloader-") as folder, _environment(nnUNet_results=folder):
        yield


def _workers_allowed() -> contextlib.AbstractContextManager[None]:
    """With 0 workers nnU-Net builds no augmenter."""
    return _environment(nnUNet_n_proc_DA="1")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
