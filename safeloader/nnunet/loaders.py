"""Makes nnU-Net's own `get_dataloaders` build our augmenters, without a copy of its code.

While it runs, and only then, an object that is made of a stock augmenter class becomes one of ours in its `__init__`.
So it does not matter who makes it, where, and under which name it knows the class: a trainer with a `get_dataloaders`
of its own, a helper in another module, an alias, an import in the middle of a function. A class that somebody has
derived from a stock one is left alone, because nothing is known of it: `unprotected` finds those.

The number of workers is asked by name in the modules of all functions called `get_dataloaders` along the trainer's
classes; there that name stands for ours meanwhile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from safeloader.augmenter import SafeAugmenter, SafeMultiThreadedAugmenter
from safeloader.faults.cpus import CpuBudget
from safeloader.faults.incident import Incident
from safeloader.nnunet.resume import StreamStates
from safeloader.runner import PoolRunner

OURS: Final = {
    NonDetMultiThreadedAugmenter: SafeAugmenter,
    MultiThreadedAugmenter: SafeMultiThreadedAugmenter,
}
"""What stands for each of the stock classes."""
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


Augmenter = SafeAugmenter | SafeMultiThreadedAugmenter


@dataclass
class LoaderFactory:
    """Makes ours of the augmenters that `get_dataloaders` builds; remembers them.

    Attributes:
        rank: Of this process in DDP, else 0.
        world_size: Number of ranks, else 1.
        folder: Where the augmenters write incidents, and remember quarantined cases.
        seed: The root seed of all.
        states: Where their streams go on, or None to begin new ones.
        on_incident: Is told of each failure of a worker, or None.
        built: The augmenters by name, "train" first, then "val", as nnU-Net builds them.
    """

    rank: int
    world_size: int
    folder: str
    seed: int
    states: StreamStates | None = None
    on_incident: Callable[[Incident], None] | None = None
    built: dict[str, Augmenter] = field(default_factory=dict)

    def adopt(self, made: Any, *args: Any, **kwargs: Any) -> None:
        """Let `made`, an object of a stock class that has just been made, be ours, with the stock class's arguments.

        All use one root seed, in streams of their own. So one number is enough to have the same batches again.

        One that goes on gives its last batch once more: nnU-Net's `get_dataloaders` draws one of each, and drops it.
        """
        index = len(self.built)
        name = LOADERS[index] if index < 2 else f"loader{index}"
        title = pool_name(name, self.rank)
        stream = stream_number(self.rank, self.world_size, index)
        made.__class__ = OURS[type(made)]
        options = {"seed": self.seed, "stream": stream, "name": title, "folder": self.folder}
        made.__init__(*args, **kwargs, **options, on_incident=self.on_incident)
        state = None if self.states is None else self.states.state_of(name, stream, given_back=1)
        if state is not None and isinstance(made, SafeAugmenter):
            made.load_state_dict(state)
        self.built[name] = made

    def go_on(self) -> None:
        """If a trainer's `get_dataloaders` did not draw a batch of each: begin where the streams stood."""
        for name, augmenter in self.built.items():
            report = augmenter.report()
            state = None if self.states is None else self.states.state_of(name, report.stream)
            if not isinstance(augmenter, SafeAugmenter) or state is None:
                continue
            if report.next_ticket != state["next_ticket"]:
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
def adopted(adopt: Callable[..., None]) -> Iterator[None]:
    """Inside the `with` block, an object of a stock class is made by `adopt(object, *arguments)`."""
    with ExitStack() as stack:
        for stock in OURS:
            stack.enter_context(_made_with(stock, _adopting(stock, adopt)))
        yield


def _adopting(stock: Any, adopt: Callable[..., None]) -> Callable[..., None]:
    itself = stock.__init__

    def __init__(made: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it stands for one
        if type(made) is not stock:  # ours, or a class that somebody has derived
            itself(made, *args, **kwargs)
            return
        with _made_with(stock, itself):  # where ours can't run, it makes a stock one
            adopt(made, *args, **kwargs)

    return __init__


@contextmanager
def _made_with(stock: Any, initialise: Callable[..., None]) -> Iterator[None]:
    before = stock.__init__
    stock.__init__ = initialise
    try:
        yield
    finally:
        stock.__init__ = before


@contextmanager
def safe_loaders(
    trainer_class: type, factory: LoaderFactory, cpus: CpuBudget, say: Callable[[str], None]
) -> Iterator[None]:
    """Inside the `with` block, the stock `get_dataloaders` of `trainer_class` builds augmenters of ours.

    Stops what was built if the block raises.
    """
    with ExitStack() as stack:
        stack.enter_context(adopted(factory.adopt))
        for namespace in namespaces(trainer_class):
            count = namespace.get(WORKER_COUNT)
            if count is not None:
                stack.enter_context(replaced(namespace, {WORKER_COUNT: WorkerCount(count, cpus, say)}))
        try:
            yield
        except BaseException:
            factory.close()
            raise


def unprotected(loaders: Any) -> str | None:
    """A line about the loaders with workers that are not ours, among those that a trainer has built; None without."""
    loaders = loaders if isinstance(loaders, (tuple, list)) else (loaders,)
    others = [loader for loader in loaders if isinstance(loader, tuple(OURS)) and not isinstance(loader, PoolRunner)]
    if not others:
        return None
    kinds = ", ".join(dict.fromkeys(f"{type(loader).__module__}.{type(loader).__qualname__}" for loader in others))
    stock = next(stock for stock in OURS if isinstance(others[0], stock))
    return (
        f"SafeLoader: WARNING: {'the loaders' if len(others) > 1 else 'a loader'} of this trainer can't be replaced by "
        f"SafeLoader's: {kinds}. The first of its workers that dies will end the training, as without SafeLoader. "
        f"What to do: in the trainer, use {stock.__name__} itself or safeloader.{OURS[stock].__name__} instead."
    )
