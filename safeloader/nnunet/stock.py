"""The loader that nnU-Net itself would train with, taken from a dataset: for commands that look at it.

nnU-Net's own trainer builds it. Nothing is written into nnU-Net's folders.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from safeloader.errors import ConfigError
from safeloader.nnunet.loaders import adopted, namespaces, replaced
from safeloader.nnunet.mixin import SafeLoaderMixin
from safeloader.pool.work import Work


class _Taken:
    """What a trainer has built instead of an augmenter."""

    def __iter__(self) -> Iterator[None]:
        return self

    def __next__(self) -> None:
        """Nnu-Net draws one batch, and drops it."""


@dataclass(frozen=True)
class Asked:
    """Which training is meant, in nnU-Net's own terms.

    Attributes:
        dataset: its number or name. configuration: for example `3d_fullres`. fold: which.
        plans: the plans' identifier. trainer: the trainer's class name.
    """

    dataset: str
    configuration: str
    fold: int = 0
    plans: str = "nnUNetPlans"
    trainer: str = "nnUNetTrainer"

    def __str__(self) -> str:
        return f"-d {self.dataset} -c {self.configuration} -f {self.fold} -p {self.plans} -tr {self.trainer}"


def training_loader(asked: Asked) -> Work:
    """The loader and transforms of a training.

    Raises:
        ConfigError: nnU-Net is missing, or does not find one of these.
    """
    with stock_trainer(asked, "cpu") as built:
        return loader_of(built, asked)


@contextmanager
def stock_trainer(asked: Asked, device: str) -> Iterator[Any]:
    """A trainer with its network, that writes nothing where the user would find it.

    Raises:
        ConfigError: nnU-Net is missing, or does not find what is asked for.
    """
    try:
        from nnunetv2.run.run_training import get_trainer_from_args
    except ImportError as error:
        raise ConfigError(f"nnU-Net can't be imported ({error}): `pip install nnunetv2`") from error
    with _results_nowhere():
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                built = get_trainer_from_args(
                    asked.dataset,
                    asked.configuration,
                    asked.fold,
                    trainer_name=asked.trainer,
                    plans_identifier=asked.plans,
                    device=torch.device(device),
                )
                built.initialize()
            except (RuntimeError, OSError, ValueError, KeyError, AssertionError, TypeError) as error:
                raise ConfigError(f"nnU-Net does not find {asked}: {_first_line(error)}") from error
        yield built


def loader_of(trainer: Any, asked: Asked) -> Work:
    """The training loader and transforms that a trainer's `get_dataloaders` would give to an augmenter.

    Raises:
        ConfigError: it can't make them.
    """
    works: list[Work] = []

    def take(made: Any, data_loader: Any, transform: Any, *_: Any, **__: Any) -> None:
        made.__class__ = _Taken
        works.append(Work(data_loader, transform))

    # Behind our mixin the same loaders are built, and no pool is started for the batch that nnU-Net draws and drops.
    build: Any = super(SafeLoaderMixin, trainer) if isinstance(trainer, SafeLoaderMixin) else trainer
    with contextlib.ExitStack() as stack:
        stack.enter_context(adopted(take))
        for namespace in namespaces(type(trainer), "do_split"):
            stack.enter_context(replaced(namespace, {"save_json": _write_no_split}))
        stack.enter_context(_workers_allowed())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            build.get_dataloaders()
        except (OSError, ValueError, KeyError, AssertionError) as error:
            raise ConfigError(f"nnU-Net can't make loaders for {asked}: {_first_line(error)}") from error
    if not works:
        raise ConfigError(f"trainer {trainer.__class__.__name__} builds its loaders in a way of its own")
    return works[0]


def _write_no_split(*_: Any, **__: Any) -> None:
    """The first training of a dataset writes its splits into `nnUNet_preprocessed`; who only looks does not."""


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
