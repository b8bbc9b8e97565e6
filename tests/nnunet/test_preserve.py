"""Whatever ends a training early: the last finished epoch's state is on disk, and the last line says how to go on."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safeloader.errors import CheckpointError
from safeloader.nnunet import checkpoints, go_on
from safeloader.nnunet.checkpoints import damage, save_atomically
from safeloader.nnunet.interrupts import SIGNALS, EndedBySignal, Interrupts
from safeloader.nnunet.short import ShortTraining, read_steps
from safeloader.nnunet.workspace import SMALL_CONFIGURATION, Workspace
from safeloader.pool.supervisor import Supervisor
from safeloader.testing import wait_until
from tests.nnunet.conftest import MakeTrainer

EPOCHS = 3
COMMAND = ["/bin/nnUNetv2_train", "777", SMALL_CONFIGURATION, "0", "-tr", "T", "-pretrained_weights", "w.pth"]
AGAIN = f"Start again with: nnUNetv2_train 777 {SMALL_CONFIGURATION} 0 -tr T -pretrained_weights w.pth"
FURTHER = f"Go on with: nnUNetv2_train 777 {SMALL_CONFIGURATION} 0 -tr T --c"
VALIDATE = f"Validate with: nnUNetv2_train 777 {SMALL_CONFIGURATION} 0 -tr T --val"

Strike = Callable[[Any, str], None]


class Struck(ShortTraining):
    """Is told where it may be struck: at each step of an epoch, and at its ends."""

    epochs = EPOCHS
    iterations = 2
    val_iterations = 2
    strike: Strike = staticmethod(lambda trainer, moment: None)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().train_step(batch)
        self.strike(self, "train")  # the weights are already the next epoch's
        return outputs

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().validation_step(batch)
        self.strike(self, "val")
        return outputs

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self.current_epoch -= 1
        self.strike(self, "epoch end")
        self.current_epoch += 1

    def on_train_end(self) -> None:
        self.strike(self, "last epoch")
        super().on_train_end()
        self.strike(self, "end")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        self.strike(self, "validation")


def at(moment: str, epoch: int, do: Callable[[Any], object]) -> Strike:
    def strike(trainer: Any, now: str) -> None:
        if (now, trainer.current_epoch) == (moment, epoch):
            do(trainer)

    return strike


def send(number: int) -> Callable[[Any], None]:
    return lambda _: os.kill(os.getpid(), number)


def fail(_: Any) -> None:
    raise ArithmeticError("the loss is not a number")


@pytest.fixture
def make(
    make_trainer: MakeTrainer,
    make_workspace: Callable[..., Workspace],
    nnunet: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Any]]:
    """Makes trainers with the same weights; all in one workspace, unless they are given another."""
    threads = torch.get_num_threads()
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:  # the tests were started by nohup, and what is ignored stays so
            signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)  # several would spin while they wait for each other, and take longer
    monkeypatch.setattr(sys, "argv", COMMAND)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    home = make_workspace()

    class Preserved(nnunet.SafeLoaderMixin, Struck, nnunet.nnUNetTrainer):
        pass

    def make(strike: Strike | None = None, *, cls: type | None = None, workspace: Workspace | None = None) -> Any:
        torch.manual_seed(0)
        trainer = make_trainer(cls or Preserved, workspace=workspace or home)
        trainer.logger.plot_progress_png = lambda folder: None  # a second for each
        if strike is not None:
            trainer.strike = strike
        return trainer

    make.trainer_class = Preserved  # type: ignore[attr-defined]
    yield make
    torch.set_num_threads(threads)


@pytest.fixture
def _one_nursery(make: Callable[..., Any]) -> Iterator[None]:
    """All trainings of a test share it: to import nnU-Net takes it seconds."""
    with Supervisor.hold():
        yield


def latest(trainer: Any) -> Path:
    return Path(trainer.output_folder) / "checkpoint_latest.pth"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def last_line(trainer: Any) -> str:
    line = Path(trainer.log_file).read_text().rstrip().rpartition("\n")[2]
    return line[line.index("SafeLoader: ") :].rstrip()


def ended(epoch: int, cause: str) -> str:
    return f"SafeLoader: the training was ended in epoch {epoch} by {cause}: "


def assert_same(one: Any, other: Any, *, where: str = "") -> None:
    """Bit for bit, but for the clock."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if not str(key).endswith("_timestamps"):
                assert_same(one[key], other[key], where=f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, where=f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def end(trainer: Any) -> BaseException:
    """Train until something ends it."""
    with pytest.raises((ArithmeticError, SystemExit, KeyboardInterrupt)) as raised:
        trainer.run_training()
    return raised.value


# ---- what ends it ----


@pytest.mark.parametrize(
    ("ends", "error", "code", "cause"),
    [
        (fail, ArithmeticError, None, "ArithmeticError"),
        (send(signal.SIGTERM), EndedBySignal, 143, "SIGTERM"),
        (send(signal.SIGHUP), EndedBySignal, 129, "SIGHUP"),
        (send(signal.SIGUSR1), EndedBySignal, 138, "SIGUSR1"),
        (send(signal.SIGINT), KeyboardInterrupt, None, "KeyboardInterrupt"),
    ],
    ids=["exception", "SIGTERM", "SIGHUP", "SIGUSR1", "Ctrl-C"],
)
def test_the_last_finished_epoch_is_on_disk(
    ends: Callable[[Any], None], error: type[BaseException], code: int | None, cause: str, make: Callable[..., Any]
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    states = []

    def remember(trainer: Any) -> None:
        path = Path(trainer.output_folder) / "as_nnunet_writes_it.pth"
        trainer.save_checkpoint(str(path))
        states.append(load(path))

    trainer = make(
        lambda trainer, moment: [at("epoch end", 0, remember)(trainer, moment), at("train", 1, ends)(trainer, moment)]
    )
    with pytest.raises(error) as raised:
        trainer.run_training()
    assert getattr(raised.value, "code", None) == code
    assert_same(load(latest(trainer)), states[0])
    assert load(latest(trainer))["current_epoch"] == 1
    assert not torch.equal(
        next(iter(load(latest(trainer))["network_weights"].values())), next(trainer.network.parameters())
    )
    line = f"{ended(1, cause)}the state after epoch 0 is in {latest(trainer)}. {FURTHER}"
    assert last_line(trainer) == line
    assert getattr(raised.value, "__notes__", [line]) == [line]
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.usefixtures("_one_nursery")
def test_requeued_until_it_is_done_it_is_the_training_that_was_not_disturbed(
    make: Callable[..., Any], make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFELOADER_SEED", "5")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    undisturbed = make()
    undisturbed.run_training()

    elsewhere = make_workspace()
    codes = []
    for epoch, moment in zip(range(1, EPOCHS + 1), ["train", "val", "last epoch"], strict=True):
        trainer = make(at(moment, epoch, send(signal.SIGTERM)), workspace=elsewhere)
        if latest(trainer).exists():  # as `--c` does
            trainer.load_checkpoint(str(latest(trainer)))
        assert trainer.current_epoch == max(0, epoch - 1)
        codes.append(getattr(end(trainer), "code", None))
        assert load(latest(trainer))["current_epoch"] == epoch
    assert codes == [143] * EPOCHS
    trainer = make(workspace=elsewhere)
    trainer.load_checkpoint(str(latest(trainer)))
    trainer.run_training()
    finals = [load(latest(t).with_name("checkpoint_final.pth")) for t in (undisturbed, trainer)]
    assert_same(*finals)
    assert finals[0]["current_epoch"] == EPOCHS
    assert not latest(trainer).exists()


def test_a_real_training_is_ended_twice_and_goes_on(make_workspace: Callable[..., Workspace]) -> None:
    undisturbed, disturbed = (make_workspace(epochs=EPOCHS, iterations=8, val_iterations=1) for _ in range(2))
    for workspace in (undisturbed, disturbed):
        (workspace.trainers / "seeded.py").write_text(SEEDED)
    name, output = "nnUNetTrainerSeeded", disturbed.output_folder("nnUNetTrainerSeeded")
    own = {"SAFELOADER_SEED": "5", "nnUNet_n_proc_DA": "1"}

    def start(workspace: Workspace, *options: str) -> subprocess.Popen[bytes]:
        screen = (workspace.folder / "screen.txt").open("wb")
        with screen:
            command = workspace.train_command(name, *options)
            return subprocess.Popen(command, env=workspace.environment(own), stdout=screen, stderr=screen)

    def ended_in(epoch: int, number: int, *options: str) -> tuple[int, str]:
        training = start(disturbed, *options)
        wait_until(lambda: any(s.epoch == epoch for s in read_steps(output)), timeout_s=200, what=f"epoch {epoch}")
        training.send_signal(number)
        return training.wait(60), (disturbed.folder / "screen.txt").read_text()

    whole = start(undisturbed)
    further = f"Go on with: nnUNetv2_train {disturbed.dataset} {SMALL_CONFIGURATION} 0 -tr {name} -device cpu --c\n"
    there = f"is in {output / 'checkpoint_latest.pth'}. {further}"
    code, screen = ended_in(1, signal.SIGTERM)
    assert code == 143
    assert screen.endswith(f"{ended(1, 'SIGTERM')}the state after epoch 0 {there}")
    assert "Traceback" not in screen
    code, screen = ended_in(2, signal.SIGINT, "--c")
    assert code == -signal.SIGINT
    assert screen.endswith(f"\nKeyboardInterrupt\n{ended(2, 'KeyboardInterrupt')}the state after epoch 1 {there}")
    assert screen.count("Traceback") == 1
    assert start(disturbed, "--c").wait(200) == 0, (disturbed.folder / "screen.txt").read_text()
    assert whole.wait(200) == 0
    assert_same(*(load(w.output_folder(name) / "checkpoint_final.pth") for w in (undisturbed, disturbed)))


SEEDED = """
import torch
from safeloader.nnunet.mixin import SafeLoaderMixin
from short_trainers import nnUNetTrainerShort

class nnUNetTrainerSeeded(SafeLoaderMixin, nnUNetTrainerShort):
    def initialize(self):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        super().initialize()

    def perform_actual_validation(self, save_probabilities=False):
        pass  # not what this is about, and it takes as long as all the rest
"""


# ---- when it comes at a bad moment ----


def test_a_signal_at_the_end_of_an_epoch_waits_until_the_epoch_is_kept(make: Callable[..., Any]) -> None:
    trainer = make(at("epoch end", 1, send(signal.SIGTERM)))
    assert isinstance(end(trainer), EndedBySignal)
    assert load(latest(trainer))["current_epoch"] == 2
    assert "the training was ended in epoch 2 by SIGTERM: the state after epoch 1 is in" in last_line(trainer)


def test_what_fails_at_the_end_of_an_epoch_has_it_trained_again(make: Callable[..., Any]) -> None:
    trainer = make(at("epoch end", 1, fail))
    end(trainer)
    assert load(latest(trainer))["current_epoch"] == 1


def test_a_second_signal_does_not_break_what_is_being_written(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def sync(descriptor: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    def strike(trainer: Any) -> None:
        monkeypatch.setattr(checkpoints.os, "fsync", sync)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = make(at("train", 1, strike))
    assert isinstance(end(trainer), EndedBySignal)
    assert load(latest(trainer))["current_epoch"] == 1
    screen = capfd.readouterr().err
    for name in ("SIGTERM", "SIGINT"):
        assert f"SafeLoader: {name} again: this process ends once the checkpoint is written" in screen


def test_a_training_thread_that_native_code_does_not_give_back_is_not_waited_for(make: Callable[..., Any]) -> None:
    def hang(trainer: Any) -> None:
        mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex)
        os.kill(os.getpid(), signal.SIGTERM)
        lock(mutex)

    trainer = make(at("train", 1, hang))
    trainer._interrupts = Interrupts(trainer._stuck, step_patience_s=0.0, native_patience_s=0.1)
    child = os.fork()
    if child == 0:
        try:
            trainer.run_training()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert load(latest(trainer))["current_epoch"] == 1
    cause = "SIGTERM, while native code did not return"
    assert last_line(trainer) == f"{ended(1, cause)}the state after epoch 0 is in {latest(trainer)}. {FURTHER}"


def test_before_an_epoch_is_finished_nothing_is_lost(make: Callable[..., Any]) -> None:
    trainer = make(at("train", 0, fail))
    end(trainer)
    assert not latest(trainer).exists()
    ended = (
        "SafeLoader: the training was ended in epoch 0 by ArithmeticError: no epoch was finished, so nothing is lost"
    )
    assert last_line(trainer) == f"{ended}. {AGAIN}"


def test_a_continued_training_that_finishes_no_epoch_leaves_the_checkpoint_as_it_is(make: Callable[..., Any]) -> None:
    end(make(at("train", 1, fail)))
    trainer = make(at("val", 1, fail))
    content = latest(trainer).read_bytes()
    trainer.load_checkpoint(str(latest(trainer)))
    end(trainer)
    assert latest(trainer).read_bytes() == content
    assert last_line(trainer).endswith(f": the state after epoch 0 is in {latest(trainer)}. {FURTHER}")


@pytest.mark.parametrize("moment", ["end", "validation"])
def test_after_the_last_epoch_it_is_validation_that_is_left(moment: str, make: Callable[..., Any]) -> None:
    trainer = make(at(moment, EPOCHS, send(signal.SIGTERM)))
    if moment == "end":
        end(trainer)
    else:
        trainer.run_training()
        with pytest.raises(EndedBySignal):
            trainer.perform_actual_validation()
    assert sorted(path.name for path in latest(trainer).parent.glob("*.pth")) == [
        "checkpoint_best.pth",
        "checkpoint_final.pth",
    ]
    what = "training" if moment == "end" else "validation"
    assert last_line(trainer) == (
        f"SafeLoader: the {what} was ended by SIGTERM: the training itself is finished. {VALIDATE}"
    )


def test_without_checkpoints_it_says_so(make: Callable[..., Any]) -> None:
    trainer = make(at("train", 1, fail))
    trainer.disable_checkpointing = True
    end(trainer)
    assert not list(latest(trainer).parent.glob("*.pth"))
    assert last_line(trainer).endswith(
        f"by ArithmeticError: checkpointing is disabled, so nothing was written. {AGAIN}"
    )


def test_a_rank_other_than_the_first_just_ends(make: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(at("train", 1, fail))
    trainer.local_rank = 1
    assert not getattr(end(trainer), "__notes__", [])
    assert not latest(trainer).exists()
    assert "Go on with" not in capsys.readouterr().out


# ---- the files ----


def test_a_full_disk_leaves_the_old_checkpoint(make: Callable[..., Any]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(trainer: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (latest(trainer).stat().st_size // 2, before[1]))
        fail(trainer)

    trainer = make(at("train", 2, fill))
    written = make(at("train", 1, fail))
    end(written)
    content = latest(trainer).read_bytes()
    trainer.load_checkpoint(str(latest(trainer)))
    try:
        end(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert latest(trainer).read_bytes() == content
    assert last_line(trainer) == (
        f"{ended(2, 'ArithmeticError')}the state after epoch 1 could not be written: "
        f"[Errno 27] File too large. But the state after epoch 0 is in {latest(trainer)}. {FURTHER}"
    )
    assert not list(latest(trainer).parent.glob(".*"))


def test_a_checkpoint_that_is_old_is_replaced_at_the_end_of_the_epoch(make: Callable[..., Any]) -> None:
    found = []
    trainer = make(at("train", 2, lambda trainer: found.append(load(latest(trainer))["current_epoch"])))
    trainer.checkpoint_every_s = 0.0
    trainer.run_training()
    assert found == [2, 2]
    assert not latest(trainer).exists()


def test_an_earlier_trainings_end_is_not_taken_for_this_ones(make: Callable[..., Any]) -> None:
    trainer = make(at("train", 1, fail))
    final = latest(trainer).with_name("checkpoint_final.pth")
    final.write_bytes(b"an earlier one")
    end(trainer)
    assert not final.exists()
    assert final.with_name("checkpoint_final_earlier.pth").read_bytes() == b"an earlier one"
    assert (
        f"{final} is an earlier training's: renamed to checkpoint_final_earlier.pth"
        in Path(trainer.log_file).read_text()
    )


def test_what_a_subclass_adds_is_kept(make: Callable[..., Any]) -> None:
    class Adds(make.trainer_class):  # type: ignore[attr-defined,misc,name-defined]
        def save_checkpoint(self, filename: str) -> None:
            super().save_checkpoint(filename)
            torch.save({"ema": self.current_epoch}, filename.replace(".pth", "_ema.pth"))

    trainer = make(at("train", 2, fail), cls=Adds)
    end(trainer)
    assert load(latest(trainer))["current_epoch"] == 2
    assert load(latest(trainer).with_name("checkpoint_latest_ema.pth")) == {"ema": 1}


def test_a_state_that_cannot_be_kept_in_memory_ends_no_training(make: Callable[..., Any]) -> None:
    class ReadsItsFile(make.trainer_class):  # type: ignore[attr-defined,misc,name-defined]
        def save_checkpoint(self, filename: str) -> None:
            super().save_checkpoint(filename)
            load(Path(filename))

    trainer = make(at("train", 2, fail), cls=ReadsItsFile)
    end(trainer)
    log = Path(trainer.log_file).read_text()
    assert log.count("could not be kept in memory") == 1
    assert "SafeLoader: the state after epoch 0 could not be kept in memory: FileNotFoundError" in log
    best = latest(trainer).with_name("checkpoint_best.pth")
    assert f"is in {best}. {FURTHER}" in last_line(trainer)


def test_a_trainer_that_writes_no_checkpoints_is_not_said_to_have_one(make: Callable[..., Any]) -> None:
    class WritesNone(make.trainer_class):  # type: ignore[attr-defined,misc,name-defined]
        def save_checkpoint(self, filename: str) -> None:
            pass

    trainer = make(at("train", 1, fail), cls=WritesNone)
    end(trainer)
    assert last_line(trainer).endswith(f"by ArithmeticError: no checkpoint was written. {AGAIN}")


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_sigkill_while_a_checkpoint_is_written_leaves_one_that_is_whole(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint_best.pth"
    save_atomically({"epoch": 1}, path)

    class Dies:
        def __reduce__(self) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            if moment != "write":
                monkeypatch.setattr(checkpoints.os, moment, die)
            save_atomically({"epoch": 2, "end": Dies() if moment == "write" else None}, path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load(path) == {"epoch": 1}
    save_atomically({"epoch": 3}, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "what was left is used again"


def test_a_link_to_a_checkpoint_stays_one(tmp_path: Path) -> None:
    there, link = tmp_path / "scratch.pth", tmp_path / "checkpoint_best.pth"
    link.symlink_to(there)
    save_atomically([1], link)
    assert link.is_symlink()
    assert load(there) == [1]


# ---- damaged ones ----


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"values of a weight")] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("do", "wrong"),
    [
        (lambda path: None, None),
        (shorten, "its end is missing"),
        (flip, "the checksum of archive/data.pkl in it is wrong"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(bytes(1000)), "it does not begin as a checkpoint does"),
        (lambda path: torch.save([1], path, _use_new_zipfile_serialization=False), None),
    ],
    ids=["whole", "shortened", "flipped", "empty", "zeros", "old format"],
)
def test_what_is_wrong_with_a_file(do: Callable[[Path], object], wrong: str | None, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    save_atomically(["values of a weight", torch.zeros(100)], path)
    do(path)
    assert damage(path) == wrong


@pytest.mark.usefixtures("_one_nursery")
def test_a_damaged_latest_checkpoint_is_passed_over_for_the_best(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    end(make(at("train", 1, fail)))
    trainer = make(at("train", 1, fail))
    shorten(latest(trainer))
    trainer.load_checkpoint(str(latest(trainer)))
    end(trainer)
    log = Path(trainer.log_file).read_text()
    assert (
        f"{latest(trainer)} is damaged (its end is missing): training goes on from the last undamaged checkpoint, "
        in log
    )
    assert "the batches go on where the checkpoint left them (train: ticket 3" in log
    best = latest(trainer).with_name("checkpoint_best.pth")
    assert last_line(trainer).endswith(f": the state after epoch 0 is in {best}. {FURTHER}")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("checkpoint_final.pth", "remove it, and --c goes on from checkpoint_best.pth"),
        (
            "checkpoint_best.pth",
            "there is no other to go on from, so start again without --c, or put a copy of it there",
        ),
    ],
)
def test_no_other_checkpoint_is_silently_taken(name: str, remedy: str, make: Callable[..., Any]) -> None:
    trainer = make()
    path = latest(trainer).with_name(name)
    for each in {path, path.with_name("checkpoint_best.pth")}:
        trainer.save_checkpoint(str(each))
    shorten(path)
    with pytest.raises(CheckpointError, match="is damaged") as raised:
        trainer.load_checkpoint(str(path))
    assert str(raised.value) == f"{path} is damaged (its end is missing): {remedy}"


# ---- signals ----


def nobody(name: str) -> None:
    raise AssertionError(name)


def test_handlers_of_the_users_own_and_ignored_signals_are_left_alone() -> None:
    def mine(*_: object) -> None: ...

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, mine)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(nobody).installed():
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_between_steps_it_is_raised_and_not_in_one() -> None:
    interrupts = Interrupts(nobody, step_patience_s=100)
    with interrupts.installed():
        interrupts.step()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(EndedBySignal):
            interrupts.step()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_where_no_exception_can_be_raised_is_raised_later() -> None:
    class Thing:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            len([])  # the handler runs here, and Python drops what it raises

    interrupts = Interrupts(nobody, step_patience_s=100)
    with interrupts.installed():
        Thing()
        with pytest.raises(EndedBySignal):
            interrupts.check()


def test_a_step_that_does_not_end_is_interrupted() -> None:
    interrupts = Interrupts(nobody, step_patience_s=0.0)
    with interrupts.installed():
        interrupts.step()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            threading.Event().wait(60)


def test_a_forked_child_ends_as_without_us_and_the_training_hears_nothing_of_it() -> None:
    interrupts = Interrupts(nobody, step_patience_s=0.0)
    with interrupts.installed():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    interrupts.check()


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "option", "command"),
    [
        (["7", "2d", "0", "-p", "P", "--npz"], "--c", "7 2d 0 -p P --npz --c"),
        (["7", "2d", "0", "--c"], "--c", "7 2d 0 --c"),
        (["7", "2d", "0", "--c"], "--val", "7 2d 0 --val"),
        (["7", "2d", "0", "--val"], "--val", "7 2d 0 --val"),
        (["7", "-pretrained_weights", "my w.pth", "2d", "0"], "--c", "7 2d 0 --c"),
        (["7", "-pretr=w.pth", "2d", "0"], "--c", "7 2d 0 --c"),
        (["7", "-pretrained_weights", "my w.pth", "2d", "0"], None, "7 -pretrained_weights 'my w.pth' 2d 0"),
    ],
)
def test_the_command_is_the_one_that_started_it(arguments: list[str], option: str | None, command: str) -> None:
    argv = ["/somewhere/nnUNetv2_train", *arguments]
    assert go_on.command(None, option, argv) == f"nnUNetv2_train {command}"  # type: ignore[arg-type]


def test_a_program_of_the_users_own_gets_the_command_from_the_trainer(make: Callable[..., Any]) -> None:
    trainer = make()
    assert go_on.command(trainer, "--c", ["train.py"]) == (
        f"nnUNetv2_train {trainer.plans_manager.dataset_name} {SMALL_CONFIGURATION} 0 -tr Preserved -p nnUNetPlans "
        "-device cpu --c"
    )
