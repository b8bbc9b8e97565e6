"""A small segmentation dataset made of nilearn's MNI152 brain: real anatomy, no download.

nilearn carries the ICBM152 2009a template (Fonov et al., NeuroImage 54, 2011) in its package: a T1 image with
probability maps of grey and white matter. Each case is that brain, moved by a random affine map and with its
intensities changed as scanners do it (gain, gamma, a smooth bias field, noise). Label 1 is grey matter, label 2
is white matter. The cases of one seed are always the same. `Contents` says what else a dataset may hold: more
channels, regions in place of labels, slices that nobody has labelled.

The demo and the tests use it. It writes nnU-Net's raw format and imports nothing of nnU-Net.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage  # type: ignore[import-untyped]

DATASET_ID: Final = 777

_Volume = npt.NDArray[np.float32]
_Labels = npt.NDArray[np.uint8]
_IGNORE_LABEL: Final = 3
"""nnU-Net wants the highest label there is."""


@dataclass(frozen=True)
class Contents:
    """What the cases of a dataset hold.

    Attributes:
        number: The dataset's, three digits.
        title: What stands behind the number in its name.
        channels: Images per case: T1, then contrasts that weight T1, grey and white matter in other ways.
        regions: The network learns brain tissue (both labels) and white matter in it, which overlap, not two labels.
        unlabelled: A slab of slices of each case has nnU-Net's ignore label: nobody has labelled it.
    """

    number: int
    title: str
    channels: int = 1
    regions: bool = False
    unlabelled: bool = False

    @property
    def dataset(self) -> str:
        """The dataset's name, `DatasetXXX_Title`."""
        return f"Dataset{self.number:03d}_{self.title}"

    def description(self, cases: int) -> dict[str, Any]:
        """What nnU-Net's `dataset.json` says about it."""
        labels: dict[str, int | list[int]] = {"background": 0, "grey matter": 1, "white matter": 2}
        if self.regions:
            labels = {"background": 0, "brain tissue": [1, 2], "white matter": 2}
        if self.unlabelled:
            labels["ignore"] = _IGNORE_LABEL
        names = ["T1", *(f"contrast {number}" for number in range(1, self.channels))]
        return {
            "channel_names": {str(number): name for number, name in enumerate(names)},
            "labels": labels,
            # In which order the regions are painted into one segmentation: the smaller one over the larger.
            **({"regions_class_order": [1, 2]} if self.regions else {}),
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }


PLAIN: Final = Contents(DATASET_ID, "SafeLoaderBrain")
DATASET_NAME: Final = PLAIN.dataset


@dataclass(frozen=True)
class Brain:
    """The template: three maps of one shape, `(x, y, z) float32` in 0…1, and where their voxels lie (mm)."""

    t1: _Volume
    grey: _Volume
    white: _Volume
    affine: npt.NDArray[np.float64]

    @classmethod
    def load(cls, resolution_mm: int) -> Brain:
        """Resample nilearn's template to cubic voxels of `resolution_mm` (1 and more)."""
        # Imported only where it is needed: it takes two seconds, and who trains on the dataset needs but its name.
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

        t1, grey, white = (
            load(resolution=resolution_mm)
            for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
        )
        return cls(_voxels(t1), _voxels(grey), _voxels(white), affine=t1.affine)

    def case(self, rng: np.random.Generator, contents: Contents = PLAIN) -> tuple[list[_Volume], _Labels]:
        """One new brain: images `(x, y, z) float32` in about 0…1000, labels `(x, y, z) uint8` in {0, 1, 2, 3}."""
        matrix, offset = _random_affine(self.t1.shape, rng)
        t1, grey, white = (
            ndimage.affine_transform(volume, matrix, offset, order=1) for volume in (self.t1, self.grey, self.white)
        )
        # Whichever tissue is the most likely; the constant stands for "neither".
        labels = np.argmax(np.stack([np.full_like(grey, 0.4), grey, white]), axis=0).astype(np.uint8)
        images = [_rescanned(t1, rng)]
        for _ in range(1, contents.channels):
            weights = rng.uniform(0.1, 1, size=3)
            images.append(_rescanned((weights[0] * t1 + weights[1] * grey + weights[2] * white) / weights.sum(), rng))
        if contents.unlabelled:
            depth = labels.shape[2]
            start = int(rng.integers(depth // 4, depth // 2))
            labels[:, :, start : start + depth // 5] = _IGNORE_LABEL
        return images, labels


def _voxels(image: Any) -> _Volume:
    return np.asarray(image.get_fdata(), dtype=np.float32)


def _random_affine(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], Any]:
    """Rotation (±12° about each axis), scale (±8 %), shift (±3 % of the field of view), about the centre."""
    matrix = np.diag(rng.uniform(0.92, 1.08, size=3))
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-12, 12, size=3))):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        rotation = np.eye(3)
        rotation[i, i] = rotation[j, j] = np.cos(angle)
        rotation[i, j], rotation[j, i] = -np.sin(angle), np.sin(angle)
        matrix = rotation @ matrix
    centre = (np.array(shape) - 1) / 2
    shift = rng.uniform(-0.03, 0.03, size=3) * shape
    return matrix, centre - matrix @ centre + shift


def _rescanned(t1: _Volume, rng: np.random.Generator) -> _Volume:
    """The same brain from another scanner: contrast, a smooth bias field and noise, none outside the head."""
    coarse = rng.normal(0, 0.12, size=(3, 3, 3))
    zoom = np.array(t1.shape) / coarse.shape
    bias = np.exp(ndimage.zoom(coarse, zoom, order=1, grid_mode=True, mode="nearest"))
    scanned = np.clip(t1, 0, None) ** rng.uniform(0.8, 1.25) * bias * rng.uniform(600, 1000)
    scanned += rng.normal(0, 15, size=t1.shape) * (t1 > 0)
    return np.asarray(scanned, dtype=np.float32)


def write_dataset(raw: Path, *, cases: int, resolution_mm: int, seed: int = 0, contents: Contents = PLAIN) -> Path:
    """Write `cases` brains in nnU-Net's raw format.

    Args:
        raw: The folder that `nnUNet_raw` names; made if it is not there.
        cases: At least 5, since nnU-Net splits them into five folds.
        resolution_mm: Edge of a voxel. 2 gives 99 × 117 × 95 voxels, 4 gives 50 × 59 × 48.
        seed: Of the random changes.
        contents: What each case holds.

    Returns:
        The dataset's folder, by default `raw/Dataset777_SafeLoaderBrain`.
    """
    if cases < 5:
        raise ValueError(f"nnU-Net's five folds need at least 5 cases, got cases={cases}")
    brain = Brain.load(resolution_mm)
    folder = raw / contents.dataset
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(cases):
        images, labels = brain.case(np.random.default_rng([seed, index]), contents)
        name = f"brain_{index:03d}"
        for channel, image in enumerate(images):
            _save(image, brain.affine, folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        _save(labels, brain.affine, folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(contents.description(cases), indent=2), encoding="utf-8")
    return folder


def _save(voxels: npt.NDArray[Any], affine: npt.NDArray[np.float64], path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)  # type: ignore[no-untyped-call]
