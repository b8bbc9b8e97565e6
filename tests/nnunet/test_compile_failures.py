"""nnU-Net's own trainer, made to compile on the CPU, where compiling really fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer
from torch._inductor import config as inductor
from torch._inductor import cpp_builder
from torch._inductor.utils import clear_caches
from tqdm import tqdm

from safeloader.faults.explain import explain_text
from safeloader.nnunet.compiled import eager, is_compiled
from safeloader.nnunet.export.ledger import LEDGER_FILE
from safeloader.nnunet.mixin import SafeLoaderMixin
from safeloader.nnunet.short import ShortTraining
from tests import compilers

Break = Callable[[Path, pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def _a_fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that was built before, and no other search for a compiler, spares inductor the failure."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # inductor draws a progress bar, which would start a thread
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    # One thread: several spin while they wait for each other, and take the cores from g++ and from other tests.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _forget()
    # The CPU's vector instructions are taken on trust: to try them is half a minute of g++.
    with inductor.patch({"compile_threads": 1, "cpp.vec_isa_ok": True}):
        yield
    _forget()
    torch.set_num_threads(threads)


def _forget() -> None:
    torch._dynamo.reset()
    clear_caches()
    cpp_builder.cpp_compiler_search.cache_clear()


class Compiling:
    """Mixed in behind SafeLoader: nnU-Net compiles on a GPU only."""

    def _do_i_compile(self) -> bool:
        return True


def trainer_class(nnunet: ModuleType, *mixins: type) -> type:
    stock = nnunet.nnUNetTrainer
    return type("nnUNetTrainerCompiling", (SafeLoaderMixin, ShortTraining, *mixins, stock), {})


def no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))


def no_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", compilers.without_headers(folder))


def no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is a file: root, as which tests run in containers, may write everywhere else."""
    (folder / "cache").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))


WITHOUT = "To train without it from the start: `export nnUNet_compile=f`"


@pytest.mark.parametrize(
    ("broken", "said", "todo"),
    [
        (
            no_compiler,
            "found no C or C++ compiler (",
            "install a compiler: `sudo apt install build-essential`",
        ),
        (
            no_headers,
            "found no Python headers (Python.h) (",
            "install the headers: `sudo apt install gcc python3-dev`",
        ),
        (
            no_cache,
            "can't write the folder in which it keeps what it builds (",
            "name a folder that you may write",
        ),
    ],
    ids=["no compiler", "no Python.h", "no cache"],
)
def test_the_training_goes_on_with_the_same_batch(
    broken: Break,
    said: str,
    todo: str,
    nnunet: ModuleType,
    make_trainer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {}
    with monkeypatch.context() as patch:
        broken(tmp_path, patch)
        for mixins in ((), (Compiling,)):
            torch.manual_seed(3)
            trainer = make_trainer(trainer_class(nnunet, *mixins))
            losses[mixins] = steps(trainer)
    assert losses[()] == losses[(Compiling,)]
    assert not is_compiled(trainer.network) and not is_compiled(trainer.loss) and trainer._do_i_compile() is False
    (line,) = ours(trainer)
    assert line.startswith(f"SafeLoader: torch.compile {said}")
    assert f"To have it: {todo}" in line and line.endswith(WITHOUT)


def steps(trainer: Any) -> list[float]:
    """The losses of two training steps and a validation step."""
    batches = [_batch(trainer, number) for number in range(3)]
    trainer.dataloader_train = None
    trainer.network.train()
    losses = [float(trainer.train_step(batch)["loss"]) for batch in batches[:2]]
    trainer.network.eval()
    with torch.no_grad():
        return [*losses, float(trainer.validation_step(batches[2])["loss"])]


def _batch(trainer: Any, number: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(number)
    patch = trainer.configuration_manager.patch_size
    shapes = [
        [round(p * s) for p, s in zip(patch, scales, strict=True)] for scales in trainer._get_deep_supervision_scales()
    ]
    target = [torch.randint(0, 3, (2, 1, *shape), generator=random) for shape in shapes]
    return {"data": torch.randn((2, 1, *patch), generator=random), "target": target, "keys": ["case"]}


def ours(trainer: Any) -> list[str]:
    """What the training log says of torch.compile, without the time."""
    lines = Path(trainer.log_file).read_text().splitlines()
    return [line.partition(": ")[2].strip() for line in lines if "SafeLoader: torch.compile" in line]


class CompilingButPrediction(Compiling):
    """Compiles everything but what the prediction after the training needs: a network with one output."""

    epochs, iterations, val_iterations = 1, 1, 1

    def initialize(self) -> None:
        super().initialize()  # type: ignore[misc]

        def build(graph: Any, inputs: Any) -> Any:
            if not eager(self.network).decoder.deep_supervision:
                raise RuntimeError("a bug in the backend")
            return graph.forward

        self.network: Any = torch.compile(eager(self.network), backend=build)
        self.loss = eager(self.loss)


def test_the_prediction_after_the_training_goes_on_with_the_same_patch(
    nnunet: ModuleType, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "t")  # nnU-Net's predictor obeys it even on the CPU
    monkeypatch.setattr(nnUNetTrainer, "default_num_processes", 1)
    trainer = make_trainer(trainer_class(nnunet, CompilingButPrediction))
    monkeypatch.setattr(trainer.logger, "plot_progress_png", lambda folder: None)  # would keep fonts' files open
    trainer.run_training()
    assert is_compiled(trainer.network) and ours(trainer) == []
    trainer.perform_actual_validation()
    assert not is_compiled(trainer.network)
    (line,) = ours(trainer)
    assert "(RuntimeError: a bug in the backend)" in line
    folder = Path(trainer.output_folder)
    dice = json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"]
    report = json.loads((folder / "safeloader_report.json").read_text())
    assert report["outcome"] == "finished"
    (note,) = report["notes"]
    assert (note["kind"], note["text"]) == ("compile-failed", line)
    assert explain_text(Path(trainer.log_file).read_text()).primary.cause.key == "healthy"
    (folder / LEDGER_FILE).unlink()  # else the case would be kept
    trainer.perform_actual_validation()  # again, and the predictor, told to compile, does not
    assert json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"] == dice
    assert len(ours(trainer)) == 1
