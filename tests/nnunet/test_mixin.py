"""The mixin's parts on stand-ins for nnU-Net's trainer: no nnU-Net, no process, no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safeloader.faults.cpus import CpuBudget
from safeloader.nnunet.loaders import WorkerCount, namespaces, replaced, stream_number
from safeloader.nnunet.mixin import SafeLoaderMixin, checkpoint_trainer_name
from safeloader.pool.book import INCIDENTS_FILE


class Base:
    local_rank = 1  # which leaves checkpoints to rank 0

    def __init__(self, output_folder: Path) -> None:
        self.output_folder = str(output_folder)
        self.log: list[str] = []

    @staticmethod
    def build_network_architecture() -> None: ...

    def get_dataloaders(self) -> None: ...

    def run_training(self) -> None:
        raise ArithmeticError("the loss is not a number")

    def save_checkpoint(self, filename: str) -> None:
        self.saved_as = type(self).__name__

    def print_to_log_file(self, *lines: object) -> None:
        self.log += map(str, lines)


class NoMirroring(Base): ...


class SafeBase(SafeLoaderMixin, Base): ...


class SafeNoMirroring(SafeLoaderMixin, NoMirroring): ...


class SafeAndMine(SafeBase): ...


class SafeOtherNetwork(SafeBase):
    @staticmethod
    def build_network_architecture() -> None: ...


class Helper:
    """Mixed in beside; not a trainer."""


class SafeWithHelper(Helper, SafeLoaderMixin, Base): ...


@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        (SafeBase, "Base"),
        (SafeNoMirroring, "NoMirroring"),
        (SafeAndMine, "Base"),
        (SafeWithHelper, "Base"),
        (SafeOtherNetwork, "SafeOtherNetwork"),
    ],
)
def test_checkpoints_are_named_after_the_class_that_builds_the_network(
    trainer: type[SafeBase], name: str, tmp_path: Path
) -> None:
    assert checkpoint_trainer_name(trainer) == name
    own_name, instance = trainer.__name__, trainer(tmp_path)
    instance.save_checkpoint("checkpoint.pth")
    assert (instance.saved_as, trainer.__name__) == (name, own_name)


class Report:
    """What the record is asked for at the end of a training that has no loaders yet."""

    ended = False

    def __init__(self, write: Any) -> None:
        self.write = write

    def close(self) -> None: ...

    def summary(self) -> list[str]:
        return ["the summary"]


def test_an_exception_in_training_is_summed_up_and_raised(tmp_path: Path) -> None:
    trainer, outcomes = SafeBase(tmp_path), []
    trainer._safeloader = Report(outcomes.append)  # type: ignore[assignment]
    with pytest.raises(ArithmeticError, match="the loss is not a number") as raised:
        trainer.run_training()
    assert raised.value.__context__ is None
    assert outcomes == ["ArithmeticError: the loss is not a number"]
    assert trainer.log == ["the summary"]


def test_a_report_that_can_not_be_written_hides_nothing(tmp_path: Path) -> None:
    def write(outcome: str) -> None:
        raise OSError(28, "No space left on device")

    trainer = SafeBase(tmp_path)
    trainer._safeloader = Report(write)  # type: ignore[assignment]
    with pytest.raises(ArithmeticError, match="the loss is not a number"):
        trainer.run_training()
    assert trainer.log[-1] == "SafeLoader: the report could not be written: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("rank", "epoch", "aside"),
    [
        (0, 0, [INCIDENTS_FILE, "safeloader_audit_train.jsonl", "safeloader_audit_val.jsonl"]),
        (1, 0, ["safeloader_audit_train%401.jsonl", "safeloader_audit_val%401.jsonl"]),
        (0, 1, []),
    ],
    ids=["anew", "anew, the second rank", "continued"],
)
def test_a_training_that_begins_anew_puts_aside_what_it_would_append_to(
    rank: int, epoch: int, aside: list[str], tmp_path: Path
) -> None:
    audits = [f"safeloader_audit_{loader}{of}.jsonl" for loader in ("train", "val") for of in ("", "%401")]
    for name in (INCIDENTS_FILE, *audits):
        (tmp_path / name).write_text(name)
    trainer: Any = SafeBase(tmp_path)
    trainer.local_rank, trainer.current_epoch, trainer.is_ddp = rank, epoch, False
    trainer.get_dataloaders()
    assert {name for name in (INCIDENTS_FILE, *audits) if not (tmp_path / name).exists()} == set(aside)
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == sorted([INCIDENTS_FILE, *audits]), "all are kept"


def test_a_stream_number_is_given_once() -> None:
    numbers = [stream_number(rank, 4, index) for rank in range(4) for index in range(5)]
    assert len(set(numbers)) == len(numbers)
    assert [stream_number(rank, 4, index) for rank in range(2) for index in range(2)] == [0, 1, 2, 3]


def test_the_namespaces_of_all_functions_along_the_classes_are_found() -> None:
    elsewhere: dict[str, Any] = {}
    exec("def get_dataloaders(self): ...", elsewhere)  # a user's module

    class Mine(Base):
        get_dataloaders = elsewhere["get_dataloaders"]

    assert [id(namespace) for namespace in namespaces(Mine)] == [id(elsewhere), id(globals())]


def test_names_are_put_back_after_an_exception_and_none_is_added() -> None:
    namespace = {"there": 1}

    def fail() -> None:
        with replaced(namespace, {"there": 2, "not there": 3}):
            assert namespace == {"there": 2}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert namespace == {"there": 1}


@pytest.mark.parametrize(("asked", "cpus", "given"), [(0, 4, 0), (3, 4, 3), (4, 4, 4), (12, 4, 4)])
def test_the_number_of_workers_is_lowered_never_raised(asked: int, cpus: int, given: int) -> None:
    said: list[str] = []
    count = WorkerCount(lambda: asked, CpuBudget(cpus, "the reason"), said.append)
    assert count() == given
    wanted = [] if asked == given else ["SafeLoader: 4 training workers instead of 12: the reason"]
    assert said == wanted
