"""torch.compile fails somewhere in a step: the training goes on as if it had never compiled, bit for bit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from tqdm import tqdm

from safeloader.nnunet.before_step import BeforeStep
from safeloader.nnunet.compiled import eager, is_compiled
from tests.nnunet.toy_trainer import PlainTrainer, ToyTrainer, backend, batch, nothing

THREADS = "TORCHINDUCTOR_COMPILE_THREADS"


@pytest.fixture(autouse=True)
def _nothing_compiled_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(THREADS, "1")
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # inductor draws a progress bar, which would start a thread
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fail() -> None:
    raise RuntimeError("a bug in the backend")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def built(graph: Any, inputs: Any) -> Any:
    return make_boxed_func(graph.forward)


def not_built(graph: Any, inputs: Any) -> Any:
    fail()


BROKEN: dict[str, dict[str, Any]] = {
    "in the network": {"backend": backend(fail)},
    "in the loss": {"backend": backend(nothing), "loss_backend": backend(fail)},
    "in the backward pass": {
        "backend": backend(nothing),
        "loss_backend": aot_autograd(fw_compiler=built, bw_compiler=not_built),
    },
    "in validation": {"backend": backend(nothing, in_validation=fail)},
    "in the loss in validation": {"backend": backend(nothing), "loss_backend": backend(nothing, in_validation=fail)},
}


@pytest.mark.parametrize("where", BROKEN)
def test_the_training_is_the_eager_one_bit_for_bit(where: str) -> None:
    stock, trainer = PlainTrainer(), ToyTrainer(**BROKEN[where])
    parameters = [id(parameter) for parameter in trainer.optimizer.param_groups[0]["params"]]
    assert is_compiled(trainer.network) and is_compiled(trainer.loss)
    assert trainer.train(2) + trainer.train(2, first=2) == stock.train(2) + stock.train(2, first=2)
    for (name, value), wanted in zip(
        trainer.network.state_dict().items(), stock.network.state_dict().values(), strict=True
    ):
        assert torch.equal(value, wanted), name
    assert not is_compiled(trainer.network) and not is_compiled(trainer.loss)
    assert trainer._do_i_compile() is False
    assert [id(parameter) for parameter in trainer.network.parameters()] == parameters
    assert trainer.log == [
        "SafeLoader: torch.compile failed in the training process (RuntimeError: a bug in the backend). The same "
        "batch was computed again without it, and training goes on without it: same results, slower on most GPUs. To "
        "see the whole error: train with nnU-Net's own trainer, which it ends, and `TORCHDYNAMO_VERBOSE=1`. To train "
        "without it from the start: `export nnUNet_compile=f`"
    ]


def test_what_compiles_stays_compiled() -> None:
    trainer = ToyTrainer(backend=backend(nothing))
    assert trainer.train() == PlainTrainer().train()
    assert is_compiled(trainer.network) and is_compiled(trainer.loss)
    assert trainer._do_i_compile() is True and trainer.log == []


def test_a_gradient_scaler_takes_no_step_twice() -> None:
    stock, trainer = PlainTrainer(), ToyTrainer(**BROKEN["in the backward pass"])
    for each in (stock, trainer):
        each.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    assert trainer.train() == stock.train()
    assert trainer.grad_scaler.state_dict() == stock.grad_scaler.state_dict()
    assert len(trainer.log) == 1


def test_a_scaler_that_has_unscaled_already_begins_anew() -> None:
    trainer = PlainTrainer()
    scaler = trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.network.train()
    before = BeforeStep.of(trainer, batch(0))
    for _ in range(2):
        scaler.scale(trainer.network(batch(0)["data"])[0].sum()).backward()
        scaler.unscale_(trainer.optimizer)  # a second time without an update in between is an error
        before.restore()
        assert scaler.get_scale() == 1024.0
        assert all(parameter.grad is None for parameter in trainer.network.parameters())


class ChangesWeights(PlainTrainer):
    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            next(self.network.parameters()).add_(1)
        return super().train_step(batch)


class ChangesBatch(PlainTrainer):
    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["target"][0][batch["target"][0] == 2] = 0
        return super().train_step(batch)


@pytest.mark.parametrize("base", [ChangesWeights, ChangesBatch])
def test_a_step_that_can_not_be_repeated_exactly_is_not(base: type[PlainTrainer]) -> None:
    trainer = type("Trainer", (ToyTrainer, base), {})(backend=backend(fail))
    with pytest.raises(RuntimeError, match="a bug in the backend"):
        trainer.train()
    assert trainer.log == [] and is_compiled(trainer.network)


class Runs(nn.Module):
    """A network whose forward pass raises; counts how often it is asked to."""

    def __init__(self, network: nn.Module, error: Exception) -> None:
        super().__init__()
        self.network, self.error, self.calls = network, error, 0

    @torch.compiler.disable
    def raise_error(self) -> None:
        self.calls += 1
        raise self.error

    def forward(self, x: torch.Tensor) -> Any:
        self.raise_error()
        return self.network(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("a bug in the user's network"),
    ],
    ids=str,
)
def test_what_is_no_failure_of_the_compiler_passes_through_and_nothing_is_repeated(error: Exception) -> None:
    trainer = ToyTrainer(backend=backend(nothing))
    raising = Runs(eager(trainer.network), error)
    trainer.network = torch.compile(raising, backend=backend(nothing))
    with pytest.raises(type(error), match=re.escape(str(error))) as raised:
        trainer.train()
    assert raised.value is error
    assert raising.calls == 1
    assert trainer.log == [] and is_compiled(trainer.network)


def test_an_out_of_memory_of_the_gpu_inside_of_the_compiler_is_one() -> None:
    trainer = ToyTrainer(backend=backend(out_of_memory))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        trainer.train()
    assert trainer.log == [] and is_compiled(trainer.network)


class WrongShape(nn.Module):
    def forward(self, output: torch.Tensor, target: torch.Tensor, loss_mask: Any = None) -> torch.Tensor:
        return (output.flatten(1) @ target.flatten(1).to(output.dtype)).mean()


@pytest.mark.filterwarnings("ignore")
def test_a_bug_in_the_loss_surfaces_as_the_users_own_error(caplog: pytest.LogCaptureFixture) -> None:
    stock, trainer = PlainTrainer(), ToyTrainer(backend=backend(nothing))
    stock.loss.loss.dc, trainer.loss.loss.dc = WrongShape(), torch.compile(WrongShape(), backend=backend(nothing))
    with pytest.raises(RuntimeError) as wanted:
        stock.train()
    with pytest.raises(RuntimeError) as raised:
        trainer.train()
    assert type(raised.value) is type(wanted.value) is RuntimeError
    assert str(raised.value) == str(wanted.value)
    assert raised.value.__cause__ is None and raised.value.__context__ is None
    assert trainer.log == [], "nobody has said that it was torch.compile"


def test_nothing_is_guarded_where_nothing_is_compiled() -> None:
    class Fails(PlainTrainer):
        calls = 0

        def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
            self.calls += 1
            torch.compile(lambda x: x + 1, backend=backend(fail))(torch.zeros(3))
            raise AssertionError

    trainer = type("Trainer", (ToyTrainer, Fails), {})()
    with pytest.raises(RuntimeError, match="a bug in the backend"):
        trainer.train()
    assert trainer.calls == 1 and trainer.log == []


def in_place(module: nn.Module) -> nn.Module:
    module.compile(backend=backend(nothing))
    return module


@pytest.mark.parametrize("put", [lambda m: torch.compile(m, backend="eager"), in_place], ids=["around", "in place"])
def test_everything_compiled_is_found_and_taken_out(put: Callable[[nn.Module], Any]) -> None:
    class Loss:
        def __init__(self) -> None:
            self.inner = nn.Sequential(nn.ReLU(), put(nn.Tanh()))
            self.function = torch.compile(nothing, backend="eager")
            self.apart = torch.compiler.disable(len)

    loss = Loss()
    apart, tanh = loss.apart, eager(loss.inner[1])
    loss.inner[1] = put(tanh)
    assert is_compiled(loss)
    assert eager(loss) is loss and not is_compiled(loss)
    assert loss.inner[1] is tanh and loss.function is nothing and loss.apart is apart
    assert eager(put(loss.inner)) is loss.inner


@pytest.mark.parametrize(("given", "wanted", "threads"), [(None, "1", 1), ("3", "3", 7)])
def test_one_thread_compiles_unless_the_user_says_otherwise(
    given: str | None, wanted: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(THREADS) if given is None else monkeypatch.setenv(THREADS, given)
    with inductor.patch(compile_threads=7):
        ToyTrainer()
        assert (os.environ.get(THREADS), inductor.compile_threads) == (given, 7), "nothing is compiled"
        trainer = ToyTrainer(backend=backend(nothing))
        assert (os.environ[THREADS], inductor.compile_threads) == (wanted, threads)
    assert trainer.log == []
