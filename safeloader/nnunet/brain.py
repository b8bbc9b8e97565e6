"""A small segmentation dataset made of nilearn's MNI152 brain: real anatomy, no download.

nilearn carries the ICBM152 2009a template (Fonov et al., NeuroImage 54, 2011) in its package: a T1 image with
probability maps of grey and white matter. Each case is that brain, moved by a random affine map and with its
intensities changed as scanners do it (gain, gamma, a smooth bias field, noise). Label 1 is grey matter, label 2
is white matter. The cases of one seed are always the same.

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
DATASET_NAME: Final = f"Dataset{DATASET_ID}_SafeLoaderBrain"

_Volume = npt.NDArray[np.float32]


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

    def case(self, rng: np.random.Generator) -> tuple[_Volume, npt.NDArray[np.uint8]]:
        """One new brain: image `(x, y, z) float32` in about 0…1000, labels `(x, y, z) uint8` in {0, 1, 2}."""
        matrix, offset = _random_affine(self.t1.shape, rng)
        t1, grey, white = (
            ndimage.affine_transform(volume, matrix, offset, order=1) for volume in (self.t1, self.grey, self.white)
        )
        # Whichever tissue is the most likely; the constant stands for "neither".
        labels = np.argmax(np.stack([np.full_like(grey, 0.4), grey, white]), axis=0).astype(np.uint8)
        return _rescanned(t1, rng), labels


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


def write_dataset(raw: Path, *, cases: int, resolution_mm: int, seed: int = 0) -> Path:
    """Write `cases` brains in nnU-Net's raw format.

    Args:
        raw: The folder that `nnUNet_raw` names; made if it is not there.
        cases: At least 5, since nnU-Net splits them into five folds.
        resolution_mm: Edge of a voxel. 2 gives 99 × 117 × 95 voxels, 4 gives 50 × 59 × 48.
        seed: Of the random changes.

    Returns:
        The dataset's folder, `raw/Dataset777_SafeLoaderBrain`.
    """
    if cases < 5:
        raise ValueError(f"nnU-Net's five folds need at least 5 cases, got cases={cases}")
    brain = Brain.load(resolution_mm)
    folder = raw / DATASET_NAME
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(cases):
        image, labels = brain.case(np.random.default_rng([seed, index]))
        name = f"brain_{index:03d}"
        _save(image, brain.affine, folder / "imagesTr" / f"{name}_0000.nii.gz")
        _save(labels, brain.affine, folder / "labelsTr" / f"{name}.nii.gz")
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "grey matter": 1, "white matter": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
    return folder


def _save(voxels: npt.NDArray[Any], affine: npt.NDArray[np.float64], path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)  # type: ignore[no-untyped-call]
