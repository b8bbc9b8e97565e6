"""What a training step may have changed by the moment at which torch.compile fails in it, and how to take that back.

A step that is repeated must be the step that an uncompiled training would have made. Until it ends, a step

* draws random numbers (dropout): the generators go back to where they were;
* updates running statistics (batch norm; nnU-Net's instance norm keeps none), even if only the loss or the backward
  pass failed: buffers are copied before each step in training mode, and given back;
* fills gradients: they are cleared, which is how nnU-Net begins every step;
* scales the loss, and unscales the gradients: the scaler forgets this step and keeps its scale;
* changes the weights, and in validation the batch (`target[target == ignore_label] = 0`). Neither can be taken back. In
  nnU-Net both come after everything that is compiled. It is not taken on trust: torch counts the changes of a tensor,
  and a step that has changed one of these is not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from safeloader.pool.seeding import draw_on, drawn_so_far


@dataclass(frozen=True)
class Draws:
    """Where the generators of `random`, NumPy and torch stand, that of the GPU included."""

    device: torch.device
    on_cpu: tuple[Any, ...]
    on_gpu: torch.Tensor | None

    @classmethod
    def so_far(cls, device: torch.device) -> Draws:
        """Where they stand now."""
        on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, drawn_so_far(), on_gpu)

    def go_on(self) -> None:
        """Have them go on from there."""
        draw_on(self.on_cpu)
        if self.on_gpu is not None:
            torch.cuda.set_rng_state(self.on_gpu, self.device)


@dataclass(frozen=True)
class Statistics:
    """The buffers of a module in training mode, and what was in them; a module in eval mode changes none."""

    buffers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, module: Any) -> Statistics:
        """Copy them: a few KiB per layer that keeps statistics."""
        return cls(tuple((buffer, buffer.clone()) for buffer in module.buffers()) if module.training else ())

    def give_back(self) -> None:
        """Undo what was done to them."""
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)


@dataclass(frozen=True)
class BeforeStep:
    """A trainer as it is before a step on `batch`."""

    trainer: Any
    batch: Any
    draws: Draws
    statistics: Statistics
    changes: int

    @classmethod
    def of(cls, trainer: Any, batch: Any) -> BeforeStep:
        """Remember it; the weights and the batch are not copied."""
        network = trainer.network
        draws, statistics = Draws.so_far(trainer.device), Statistics.of(network)
        return cls(trainer, batch, draws, statistics, _changes(network, batch))

    @property
    def can_be_repeated(self) -> bool:
        """Whether the weights and the batch are what they were."""
        return _changes(self.trainer.network, self.batch) == self.changes

    def restore(self) -> None:
        """Take back what a step has done so far."""
        self.draws.go_on()
        self.statistics.give_back()
        if self.trainer.network.training:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            _forget_step(self.trainer.grad_scaler, self.trainer.device)


def _changes(network: Any, batch: Any) -> int:
    """How often the weights and the tensors of the batch have been changed in place."""
    tensors = [*network.parameters(), *_tensors(batch)]
    return sum(tensor._version for tensor in tensors if not tensor.is_inference())


def _tensors(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from _tensors(part)


def _forget_step(scaler: Any, device: torch.device) -> None:
    """Have a gradient scaler (None: there is none) begin a new step with the scale that it has."""
    if scaler is None or not scaler.is_enabled():
        return
    # It has a scale only from the first loss on that it scaled.
    scaler.scale(torch.zeros((), device=device))
    # A scale given by hand leaves its growth alone, and forgets which optimizers were unscaled.
    scaler.update(scaler.get_scale())
