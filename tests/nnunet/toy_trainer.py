"""A trainer with nnU-Net's own steps and loss around a network of a few parameters: for questions to many trainings.

The network has what a repeated step could get wrong: dropout, running statistics, and two outputs of which nnU-Net's
deep supervision ignores the second.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from functorch.compile import make_boxed_func
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

from safeloader.nnunet.compile_guard import CompileGuard

SHAPE = (2, 1, 8, 8)


class Network(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.Dropout(0.3), nn.LeakyReLU())
        self.fine, self.coarse = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.body(x)
        return [self.fine(x), self.coarse(nn.functional.avg_pool2d(x, 2))]


class PlainTrainer:
    """Computes as nnU-Net does; compiles if it is given a backend."""

    train_step = nnUNetTrainer.train_step
    validation_step = nnUNetTrainer.validation_step
    _build_loss = nnUNetTrainer._build_loss
    was_initialized = False

    def __init__(
        self, norm: type[nn.Module] = nn.BatchNorm2d, *, backend: Any = None, loss_backend: Any = None
    ) -> None:
        self.log: list[str] = []
        self.device = torch.device("cpu")
        self.is_ddp = distributed.is_initialized()
        self.current_epoch, self.grad_scaler, self.enable_deep_supervision = 3, None, True
        self.label_manager = SimpleNamespace(has_regions=False, ignore_label=None, has_ignore_label=False)
        self.configuration_manager = SimpleNamespace(batch_dice=True)
        self.backends = (backend, loss_backend or backend)
        torch.manual_seed(7)
        self.network: Any = Network(norm)
        self.initialize()

    def initialize(self) -> None:
        if self._do_i_compile():
            self.network = torch.compile(self.network, backend=self.backends[0])
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9)
        if self.is_ddp:
            self.network = DistributedDataParallel(self.network)
        self.loss: Any = self._build_loss()
        if self._do_i_compile():  # in place of nnU-Net's torch.compile, of which nothing has been called yet
            self.loss.loss.dc = torch.compile(self.loss.loss.dc._orig_mod, backend=self.backends[1])

    def _do_i_compile(self) -> bool:
        return self.backends[0] is not None

    def _get_deep_supervision_scales(self) -> list[list[float]]:
        return [[1.0, 1.0], [0.5, 0.5]]

    def print_to_log_file(self, *lines: object) -> None:
        self.log += map(str, lines)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None: ...

    def train(self, steps: int = 3, *, first: int = 0) -> list[float]:
        """The losses of `steps` training steps and a validation step; dropout begins with the same random numbers."""
        torch.manual_seed(first)
        self.network.train()
        losses = [float(self.train_step(batch(number))["loss"]) for number in range(first, first + steps)]
        self.network.eval()
        with torch.no_grad():
            return [*losses, float(self.validation_step(batch(first))["loss"])]


class ToyTrainer(CompileGuard, PlainTrainer):  # type: ignore[misc]
    pass


def batch(number: int) -> dict[str, Any]:
    """The same for the same number, in each DDP rank another."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    rng = np.random.default_rng([number, rank])
    target = torch.from_numpy(rng.integers(0, 3, SHAPE))
    data = torch.from_numpy(rng.standard_normal(SHAPE, dtype=np.float32))
    return {"data": data, "target": [target, target[..., ::2, ::2].clone()], "keys": [f"case_{number}"]}


def nothing() -> None: ...


def backend(check: Callable[[], None], *, in_validation: Callable[[], None] | None = None) -> Any:
    """A backend that computes as without a compiler, and calls `check` whenever it builds a graph.

    Graphs that need no gradients, as in validation, have `in_validation` called instead, if it is given.
    """

    def building(check: Callable[[], None]) -> Any:
        def build(graph: Any, inputs: Any) -> Any:
            check()
            return make_boxed_func(graph.forward)

        return build

    build = building(check)
    return aot_autograd(fw_compiler=build, bw_compiler=build, inference_compiler=building(in_validation or check))


def with_a_compiler() -> None:
    """What inductor and Triton do: have g++ build something."""
    subprocess.run(["g++", "-x", "c++", "-fsyntax-only", "-"], input=b"int main() {}", check=True)
