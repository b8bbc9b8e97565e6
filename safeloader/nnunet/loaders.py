"""Makes nnU-Net's own `get_dataloaders` build our augmenter, without a copy of its code.

`get_dataloaders` finds the augmenter class and the number of workers by name in its module. While it runs, and only
then, both names stand for ours in the modules of all functions called `get_dataloaders` along the trainer's classes,
so a subclass with its own `get_dataloaders` works as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from safeloader.augmenter import SafeAugmenter
from safeloader.faults.cpus import CpuBudget
from safeloader.nnunet.resume import StreamStates

AUGMENTER: Final = "NonDetMultiThreadedAugmenter"
WORKER_COUNT: Final = "get_allowed_n_proc_DA"
LOADERS: Final = ("train", "val")
"""The augmenters that nnU-Net builds, in its order."""


def stream_number(rank: int, world_size: int, index: int) -> int:
    """The random stream of the `index`-th loader of a DDP rank: 2·rank for training, 2·rank + 1 for validation.

    A trainer that builds more than two gets numbers beyond those of all ranks.
    """
    pair, place = divmod(index, 2)
    return 2 * (pair * world_size + rank) + place


def pool_name(loader: str, rank: int) -> str:
    """What the pool of a DDP rank's loader is called: ranks share the folder and the screen."""
    return loader if rank == 0 else f"{loader}@{rank}"


@dataclass
class LoaderFactory:
    """Called by `get_dataloaders` in place of the augmenter class; remembers what it built.

    Attributes:
        rank: Of this process in DDP, else 0.
        world_size: Number of ranks, else 1.
        folder: Where the augmenters write incidents, and remember quarantined cases.
        seed: The root seed of all.
        states: Where their streams go on, or None to begin new ones.
        built: The augmenters by name, "train" first, then "val", as nnU-Net builds them.
    """

    rank: int
    world_size: int
    folder: str
    seed: int
    states: StreamStates | None = None
    built: dict[str, SafeAugmenter] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> SafeAugmenter:
        """Build the next augmenter from the stock class's arguments.

        All use one root seed, in streams of their own. So one number is enough to have the same batches again.

        One that goes on gives its last batch once more: nnU-Net's `get_dataloaders` draws one of each, and drops it.
        """
        index = len(self.built)
        name = LOADERS[index] if index < 2 else f"loader{index}"
        title = pool_name(name, self.rank)
        stream = stream_number(self.rank, self.world_size, index)
        augmenter = SafeAugmenter(*args, **kwargs, seed=self.seed, stream=stream, name=title, folder=self.folder)
        state = None if self.states is None else self.states.state_of(name, stream, given_back=1)
        if state is not None:
            augmenter.load_state_dict(state)
        self.built[name] = augmenter
        return augmenter

    def go_on(self) -> None:
        """If a trainer's `get_dataloaders` did not draw a batch of each: begin where the streams stood."""
        for name, augmenter in self.built.items():
            report = augmenter.report()
            state = None if self.states is None else self.states.state_of(name, report.stream)
            if state is not None and report.next_ticket != state["next_ticket"]:
                augmenter.load_state_dict(state)

    def close(self) -> None:
        """Stop all workers; for a `get_dataloaders` that failed half-way."""
        for augmenter in self.built.values():
            augmenter.close()


@dataclass
class WorkerCount:
    """Called by `get_dataloaders` for the number of workers: nnU-Net's answer, lowered to the CPUs there are.

    Attributes:
        stock: nnU-Net's own function.
        cpus: What this process may use.
        say: Writes one line into the training log.
    """

    stock: Callable[[], int]
    cpus: CpuBudget
    say: Callable[[str], None]

    def __call__(self) -> int:
        """The number of training workers; 0 stays single-threaded."""
        asked = self.stock()
        if asked <= self.cpus.cpus:
            return asked
        self.say(f"SafeLoader: {self.cpus.cpus} training workers instead of {asked}: {self.cpus.reason}")
        return self.cpus.cpus


def namespaces(trainer_class: type, function: str = "get_dataloaders") -> list[dict[str, Any]]:
    """The module namespaces that the methods called `function` along the classes look their names up in."""
    found: dict[int, dict[str, Any]] = {}
    for cls in trainer_class.__mro__:
        method = cls.__dict__.get(function)
        while method is not None:
            if inspect.isfunction(method):
                found[id(method.__globals__)] = method.__globals__
            method = getattr(method, "__wrapped__", None)
    return list(found.values())


@contextmanager
def replaced(namespace: dict[str, Any], replacements: Mapping[str, Any]) -> Iterator[None]:
    """Let names that exist in `namespace` stand for something else inside the `with` block."""
    before = {name: namespace[name] for name in replacements if name in namespace}
    namespace.update({name: replacements[name] for name in before})
    try:
        yield
    finally:
        namespace.update(before)


@contextmanager
def safe_loaders(
    trainer_class: type, factory: LoaderFactory, cpus: CpuBudget, say: Callable[[str], None]
) -> Iterator[None]:
    """Inside the `with` block, the stock `get_dataloaders` of `trainer_class` builds with `factory`.

    Stops what was built if the block raises.
    """
    with ExitStack() as stack:
        for namespace in namespaces(trainer_class):
            count = namespace.get(WORKER_COUNT)
            replacements: dict[str, Any] = {AUGMENTER: factory}
            if count is not None:
                replacements[WORKER_COUNT] = WorkerCount(count, cpus, say)
            stack.enter_context(replaced(namespace, replacements))
        try:
            yield
        except BaseException:
            factory.close()
            raise
