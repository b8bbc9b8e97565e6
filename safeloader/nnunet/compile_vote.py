"""Under DDP: all ranks train with torch.compile, or none.

torch.compile may fail in one rank alone: another machine, a full disk, a cache that two ranks write. That rank can't
just repeat its step without the compiler. The others are in the middle of theirs: in an all-reduce of the gradients, or
gathering the Dice of the whole batch, where they would wait for it until NCCL gives up.

    rank 0   trial ─ ok ─────┐        ┌─ the call itself
    rank 1   trial ─ failed ─┴─ vote ─┴─ CompileRefusedError in every rank, at the same call

*Invariant: when ranks vote, none of them is in, or on its way to, a collective operation that another one will not
join.* For that

* each compiled part of the network and the loss is tried by each rank alone at its first call in training, and at its
  first call in validation (`Ballot`): forward and backward on the real input, for which this call compiles anyway.
  DDP's hooks hang on the accumulation of gradients, and the trial's are not accumulated. Losses that gather over ranks
  have a switch for it, `ddp`, which is off meanwhile;
* ranks vote at these calls and at no other. They are the same calls in all ranks, because the trainer's code is;
* who voted no, or hears of a no, raises at that call. So the step ends in all ranks at the same place, before its first
  gradient exists, and all of them repeat it without the compiler.

What follows the first calls is not voted on, because nothing says that all ranks have come to the same call: a
recompilation that fails there ends the training, as it does without us. nnU-Net's shapes never change, so nothing is
recompiled in it but the loss, for the other resolutions of deep supervision. A network with `SyncBatchNorm` can't be
tried alone, because it talks to the other ranks in its forward pass: it is not voted on. In the prediction after the
training no rank waits for another, so each falls back on its own (`compile_guard.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.utils._pytree import tree_leaves, tree_map

from safeloader.nnunet.before_step import Draws, Statistics
from safeloader.nnunet.compile_causes import CompileFailure, compile_failure
from safeloader.nnunet.compiled import Forward, answered


class CompileRefusedError(Exception):
    """A rank can't compile; raised at the same call in every rank.

    Attributes:
        failure: Why, in the first rank that can't.
        ranks: Those that can't, as words: " in rank 1".
    """

    def __init__(self, failure: CompileFailure, ranks: str) -> None:
        super().__init__(f"{failure.title}{ranks}: {failure.evidence}")
        self.failure = failure
        self.ranks = ranks


class Ballot:
    """Where a rank's compiled parts are tried and voted on."""

    def __init__(self, device: torch.device, parts: list[Any]) -> None:
        """Of a rank that trains on `device`, for these `OptimizedModule`s."""
        self._device = device
        self._parts = [part for part in parts if not _talks_in_forward(part)]
        self._voted: set[tuple[int, bool]] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the `with` block, first calls of the parts are voted on."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(answered(part, partial(self._voting, part)))
            yield

    def _voting(self, part: Any, compiled: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            first = (id(part), torch.is_grad_enabled())
            if first not in self._voted:
                self._voted.add(first)
                _vote(self._trial(part, compiled, args, kwargs))
            return compiled(*args, **kwargs)

        return forward

    def _trial(self, part: Any, compiled: Forward, args: Any, kwargs: Any) -> CompileFailure | None:
        """Run forward and backward without a trace; why it failed, if that was torch.compile."""
        draws, statistics = Draws.so_far(self._device), Statistics.of(part)
        try:
            with _alone(part):
                copies, named = tree_map(_leaf, (args, kwargs))
                _backward(compiled(*copies, **named), [*part.parameters(), *tree_leaves((copies, named))])
        except Exception as error:
            failure = compile_failure(error)
            if failure is None:
                raise
            return failure
        finally:
            # Autocast keeps the weights that it has cast, with the history of the trial.
            torch.clear_autocast_cache()
            statistics.give_back()
            draws.go_on()
        return None


def _vote(failure: CompileFailure | None) -> None:
    """Hear of all ranks.

    Raises:
        CompileRefusedError: One of them, or this one, has a failure.
    """
    votes: list[CompileFailure | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(votes, failure)
    failures = {rank: vote for rank, vote in enumerate(votes) if vote is not None}
    if failures:
        named = ", ".join(map(str, failures))
        ranks = f" in rank {named}" if len(failures) == 1 else f" in ranks {named}"
        raise CompileRefusedError(next(iter(failures.values())), "" if len(failures) == len(votes) else ranks)


def _talks_in_forward(part: nn.Module) -> bool:
    return any(isinstance(module, nn.SyncBatchNorm) for module in part.modules())


@contextmanager
def _alone(part: nn.Module) -> Iterator[None]:
    """Nothing below `part` talks to other ranks inside the `with` block."""
    talking = [module for module in part.modules() if vars(module).get("ddp") is True]
    for module in talking:
        vars(module)["ddp"] = False
    try:
        yield
    finally:
        for module in talking:
            vars(module)["ddp"] = True


def _leaf(thing: Any) -> Any:
    """A tensor without its history: the trial's backward pass ends there."""
    return thing.detach().requires_grad_(thing.requires_grad) if isinstance(thing, torch.Tensor) else thing


def _backward(outputs: Any, inputs: list[Any]) -> None:
    """Compute gradients, and accumulate none."""
    ends = [out for out in tree_leaves(outputs) if isinstance(out, torch.Tensor) and out.requires_grad]
    starts = [given for given in inputs if isinstance(given, torch.Tensor) and given.requires_grad]
    if ends and starts:
        torch.autograd.grad(ends, starts, [torch.zeros_like(end) for end in ends], allow_unused=True)
