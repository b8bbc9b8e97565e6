"""Random numbers for one ticket: they depend on (root seed, stream, ticket, attempt) and on nothing else.

NumPy's `SeedSequence` spreads them: https://numpy.org/doc/stable/reference/random/bit_generators/generated/numpy.random.SeedSequence.html
Streams and tickets are its spawn key, so no two of them share a state, whatever the root seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def root_seed(seeds: Sequence[int | None] | None) -> int:
    """The root seed that stands for the stock class's `seeds`: the same for the same list, else from entropy."""
    given = [seed for seed in seeds or () if seed is not None]
    if not given:
        entropy = np.random.SeedSequence().entropy
        assert isinstance(entropy, int)
        return entropy % 2**64
    words = np.random.SeedSequence([int(seed) for seed in given]).generate_state(1, np.uint64)
    return int(words[0])


def seed_everything(root: int, stream: int, ticket: int, attempt: int = 0) -> None:
    """Seed the global generators of `random`, `numpy.random` and torch (CPU) for one ticket.

    `attempt` counts the draws of this ticket that were given up, because they hold a case that is quarantined.
    """
    key = (stream, ticket, attempt) if attempt else (stream, ticket)
    words = np.random.SeedSequence(root, spawn_key=key).generate_state(8, np.uint32)
    np.random.seed(words[:4])
    random.seed(int.from_bytes(words[4:6].tobytes(), "little"))
    # Not torch.manual_seed: it also queues a seeding of CUDA, which a worker never touches.
    torch.default_generator.manual_seed(int.from_bytes(words[6:8].tobytes(), "little"))


def drawn_so_far() -> tuple[Any, ...]:
    """The state of the generators that `seed_everything` seeds, for `draw_on`."""
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state().numpy()


def draw_on(state: tuple[Any, ...]) -> None:
    """Have them go on from that state."""
    of_random, of_numpy, of_torch = state
    random.setstate(of_random)
    np.random.set_state(of_numpy)
    torch.default_generator.set_state(torch.from_numpy(of_torch))
