"""nnU-Net's cascade transforms shuffle a list of their own in place; no batch depends on what came before, even so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from safeloader.pool.seeding import seed_everything
from safeloader.pool.shuffled import ShuffledLists
from safeloader.testing import make_twice

CHANNELS = 6


def cascade_transforms() -> ComposeTransforms:
    """As nnU-Net composes them."""
    channels = range(-CHANNELS, 0)
    dilate = ApplyRandomBinaryOperatorTransform(list(channels), strel_size=(1, 3), p_per_label=0.5)
    remove = RemoveRandomConnectedComponentFromOneHotEncodingTransform(list(channels), 0, 0.15, 0.5)
    return ComposeTransforms([RandomTransform(dilate, 0.9), RandomTransform(remove, 0.9)])


class OneHot:
    """Batches that are all the same before they are augmented."""

    def __init__(self) -> None:
        self.transforms = cascade_transforms()

    def __iter__(self) -> OneHot:
        return self

    def __next__(self) -> dict[str, Any]:
        blobs = torch.rand((CHANNELS, 8, 8, 8), generator=torch.Generator().manual_seed(1)) > 0.8
        return {"data": self.transforms(image=blobs.float())["image"]}


def parameters(transform: Any, *, before: int) -> list[int]:
    """Which channels it takes in a batch that comes after `before` others."""
    for _ in range(before):
        transform.get_parameters(image=torch.zeros(CHANNELS, 2, 2, 2))
    ShuffledLists(transform).restore()
    seed_everything(3, 0, 0)
    chosen: list[int] = transform.get_parameters(image=torch.zeros(CHANNELS, 2, 2, 2))["apply_to_channels"]
    return chosen


@pytest.mark.parametrize("place", [0, 1])
def test_what_came_before_does_not_matter(place: int) -> None:
    first, later = (cascade_transforms().transforms[place].transform for _ in range(2))
    np.random.seed(1)
    assert parameters(first, before=0) == parameters(later, before=5)


@pytest.mark.parametrize("place", [0, 1])
def test_upstream_goes_on_from_the_order_before(place: int) -> None:
    transform = cascade_transforms().transforms[place].transform
    seed_everything(3, 0, 0)
    transform.get_parameters(image=torch.zeros(CHANNELS, 2, 2, 2))
    assert transform.channel_idx != list(range(-CHANNELS, 0)), "it does not any more: pool/shuffled.py has no object"


def test_both_are_found_and_nothing_else() -> None:
    assert len(ShuffledLists(OneHot())) == 2
    assert len(ShuffledLists([3, 1], {"channel_idx": [2, 1]})) == 0


def test_every_ticket_is_made_alike_by_another_worker() -> None:
    assert make_twice(OneHot(), tickets=8) == []


def test_without_it_tickets_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShuffledLists, "restore", lambda _: None)
    assert make_twice(OneHot(), tickets=8, start_method="forked") != []
