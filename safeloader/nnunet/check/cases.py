"""What is wrong with one preprocessed case: all of it is read, and held against the plans and `dataset.json`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from safeloader.words import counted

OUTSIDE: Final = -1
"""What nnU-Net's preprocessing writes into the segmentation where the image is empty."""
_NEEDED: Final = ("class_locations", "spacing", "shape_before_cropping", "bbox_used_for_cropping")
"""Properties that training or validation looks up."""


Files = dict[str, list[int]]
"""Size (bytes) and time of the last change (ns) of each file of a case, by name."""


@dataclass(frozen=True)
class Expected:
    """What the plans and `dataset.json` say of every case.

    Attributes:
        folder: The preprocessed data of one configuration.
        channels: Of the image.
        labels: That the segmentation may hold, beside `OUTSIDE`.
        spacing: Of the configuration, in mm, `(z, y, x)`, or `(y, x)` in 2D; None if the shape does not follow from it.
        transpose: The order in which the plans take the axes of the raw image.
    """

    folder: str
    channels: int
    labels: tuple[int, ...]
    spacing: tuple[float, ...] | None
    transpose: tuple[int, ...]


def expectations(trainer: Any) -> Expected:
    """Of the dataset and configuration that a trainer was made for."""
    configuration, plans, dataset = trainer.configuration_manager, trainer.plans_manager, trainer.dataset_json
    by_default = configuration.preprocessor_name == "DefaultPreprocessor"
    return Expected(
        folder=trainer.preprocessed_dataset_folder,
        channels=len(dataset.get("channel_names") or dataset["modality"]),
        labels=tuple(sorted(_flat(dataset["labels"].values()))),
        spacing=tuple(map(float, configuration.spacing)) if by_default else None,
        transpose=tuple(plans.transpose_forward),
    )


def _flat(labels: Any) -> set[int]:
    """The labels of `dataset.json`, a number or, for a region, several."""
    return {int(label) for value in labels for label in (value if isinstance(value, (list, tuple)) else [value])}


def dataset_of(expected: Expected) -> Any:
    """nnU-Net's own reader of the folder, whatever the type of its files."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    return infer_dataset_class(expected.folder)(expected.folder)


def files_of(expected: Expected, cases: Collection[str]) -> dict[str, Files]:
    """The files of each case: the folder is listed once, however many cases there are."""
    found: dict[str, Files] = {case: {} for case in cases}
    with os.scandir(expected.folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = os.path.splitext(entry.name)[0]
            case = name if name in found else name.removesuffix("_seg")
            if case in found:
                stat = entry.stat()
                found[case][entry.name] = [stat.st_size, stat.st_mtime_ns]
    return found


def problems(dataset: Any, case: str, expected: Expected) -> list[str]:
    """All that is wrong with it; empty if nothing is. A file that can't be read may end the process.

    Raises:
        Whatever reading raises.
    """
    data, seg, _, properties = dataset.load_case(case)
    image, segmentation = np.asarray(data[:]), np.asarray(seg[:])
    return [
        *_of_image(image, expected),
        *_of_segmentation(segmentation, image, expected),
        *_of(properties, image, expected),
    ]


def _of_image(image: Any, expected: Expected) -> Iterator[str]:
    if image.ndim != 4 or image.shape[0] != expected.channels:
        yield f"the image has shape {image.shape}, and dataset.json names {counted(expected.channels, 'channel')}"
    bad = int(image.size - np.count_nonzero(np.isfinite(image)))
    if bad:
        be = "is" if bad == 1 else "are"
        yield f"{counted(bad, 'voxel')} of the image {be} NaN or infinite: the loss will be NaN"


def _of_segmentation(segmentation: Any, image: Any, expected: Expected) -> Iterator[str]:
    if segmentation.shape[1:] != image.shape[1:]:
        yield f"the segmentation has shape {segmentation.shape}, the image {image.shape}"
    unknown = sorted(set(np.unique(segmentation).tolist()) - {OUTSIDE, *expected.labels})
    if unknown:
        some = ", ".join(f"{label:g}" for label in unknown[:5]) + (" …" if len(unknown) > 5 else "")
        named = ", ".join(map(str, expected.labels))
        yield f"the segmentation holds {some}, and dataset.json names {named}"


def _of(properties: Any, image: Any, expected: Expected) -> Iterator[str]:
    missing = [name for name in _NEEDED if name not in properties]
    if missing:
        yield f"its properties lack {', '.join(missing)}: it was preprocessed by another version of nnU-Net"
    elif expected.spacing is not None and image.ndim == 4:
        wanted = _wanted_shape(properties, expected)
        if max(abs(one - other) for one, other in zip(wanted, image.shape[1:], strict=True)) > 1:
            yield (
                f"the image has shape {image.shape[1:]}, and these plans would make it {wanted}: it was preprocessed "
                "with others"
            )


def _wanted_shape(properties: Any, expected: Expected) -> tuple[int, ...]:
    """What nnU-Net's resampling makes of the cropped image: each axis times old over new spacing."""
    assert expected.spacing is not None
    before = [properties["spacing"][axis] for axis in expected.transpose]
    # In 2D slices keep their distance.
    after = [*before[: len(before) - len(expected.spacing)], *expected.spacing]
    cropped = properties.get("shape_after_cropping_and_before_resampling", image_shape(properties))
    return tuple(round(n * old / new) for n, old, new in zip(cropped, before, after, strict=True))


def image_shape(properties: Any) -> list[int]:
    """The shape after cropping, from the box that was cut out."""
    return [int(end - start) for start, end in properties["bbox_used_for_cropping"]]
