"""The kinds of data that nnU-Net trains on, each as one small training on the brain dataset.

    Kind ── contents ──► write_dataset      what a case holds: channels, regions, unlabelled slices
         ── configuration ──► the plans     2D or 3D, a cascade's stages, how the preprocessed data lies on the disk

Kinds with the same contents share one dataset and its preprocessing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from safeloader.nnunet.brain import PLAIN, Contents, write_dataset
from safeloader.nnunet.workspace import PLANS, SMALL_CONFIGURATION, Workspace

PATCH: Final = (24, 32, 24)
FEATURES: Final = (4, 8, 16)
"""Of all kinds' networks: quick to train on a CPU with images of 6 mm."""
_FLAT: Final = "2d_small"
_NPZ: Final = "3d_npz"
LOWRES: Final = "3d_lowres"
CASCADE: Final = "3d_cascade_fullres"
"""nnU-Net's own names of a cascade's stages. It plans none for images this small, so they are added to its plans."""


@dataclass(frozen=True)
class Kind:
    """A kind of data, and the configuration that trains on it.

    Attributes:
        name: For options and tables.
        about: What is special about it.
        contents: Of the dataset.
        configuration: What fold 0 is trained of.
        before: The configuration whose predictions of all cases it needs; trained with the fold `all`.
    """

    name: str
    about: str
    contents: Contents = PLAIN
    configuration: str = SMALL_CONFIGURATION
    before: str | None = None

    def workspace(self, workspace: Workspace) -> Workspace:
        """The same folder, with this kind's dataset."""
        return replace(workspace, dataset=self.contents.dataset)

    @property
    def trainings(self) -> tuple[tuple[str, str], ...]:
        """The (configuration, fold) that are trained, in order."""
        last = ((self.configuration, "0"),)
        return last if self.before is None else ((self.before, "all"), *last)


KINDS: Final = (
    Kind("3d", "3D patches of blosc2 files (.b2nd)"),
    Kind("2d", "slices", configuration=_FLAT),
    Kind("npz", "3D patches of NumPy files (.npz), which nnU-Net unpacks as training starts", configuration=_NPZ),
    Kind("cascade", "3d_lowres, then 3d_cascade_fullres on its predictions", configuration=CASCADE, before=LOWRES),
    Kind("regions", "overlapping regions in place of labels", Contents(778, "SafeLoaderRegions", regions=True)),
    Kind("ignore", "slices that nobody has labelled", Contents(779, "SafeLoaderIgnore", unlabelled=True)),
    Kind("channels", "five channels", Contents(780, "SafeLoaderChannels", channels=5)),
)


def add_kinds(workspace: Workspace, kinds: Iterable[Kind], *, cases: int, resolution_mm: int) -> None:
    """Add what kinds need to a folder in which nnU-Net has planned and preprocessed the plain dataset.

    What is there already stays. Cases are preprocessed in this process by nnU-Net's preprocessor, with the plans of
    the plain dataset: for a few small ones its commands take much longer to start than to work.

    Args:
        workspace: Of the plain dataset, preprocessed in `2d` and `3d_fullres`.
        kinds: Which.
        cases: Of each dataset, at least 5.
        resolution_mm: Edge of a voxel, as in the plain dataset.
    """
    for kind in kinds:
        there = kind.workspace(workspace)
        if not there.plans_file.exists():
            write_dataset(there.raw, cases=cases, resolution_mm=resolution_mm, contents=kind.contents)
            _copy_plans(workspace, there, kind.contents)
            preprocess(there, "3d_fullres")
        there.add_small_configuration(patch=PATCH, features=FEATURES)
        if kind.configuration == _FLAT:
            there.add_small_configuration(name=_FLAT, parent="2d", patch=PATCH[1:], features=FEATURES, batch_size=8)
        elif kind.configuration == _NPZ:
            _add_npz(there)
        elif kind.configuration == CASCADE:
            _add_cascade(there)


def preprocess(workspace: Workspace, configuration: str) -> None:
    """Nnu-Net's preprocessing of a configuration, in this process."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw, there = workspace.raw / workspace.dataset, workspace.preprocessed / workspace.dataset
    dataset = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    plans = PlansManager(str(workspace.plans_file))
    manager = plans.get_configuration(configuration)
    folder, labels = there / manager.data_identifier, there / "gt_segmentations"
    for made in (folder, labels):
        made.mkdir(parents=True, exist_ok=True)
    preprocessor = manager.preprocessor_class(verbose=False)
    for label in sorted((raw / "labelsTr").iterdir()):
        case = label.name.removesuffix(dataset["file_ending"])
        images = sorted(str(image) for image in (raw / "imagesTr").glob(f"{case}_*"))
        preprocessor.run_case_save(str(folder / case), images, str(label), plans, manager, dataset)
        shutil.copy(label, labels)


def _copy_plans(plain: Workspace, other: Workspace, contents: Contents) -> None:
    """The plans of the same images with other contents: one normalisation per channel."""
    there = other.plans_file.parent
    there.mkdir(parents=True)
    shutil.copy(other.raw / other.dataset / "dataset.json", there)
    shutil.copy(plain.plans_file.with_name("dataset_fingerprint.json"), there)
    plans = json.loads(plain.plans_file.read_text(encoding="utf-8"))
    plans["dataset_name"] = other.dataset
    # They normalise CT images only; each channel has to have some.
    intensities = plans["foreground_intensity_properties_per_channel"]
    intensities.update({str(channel): intensities["0"] for channel in range(contents.channels)})
    for configuration in plans["configurations"].values():
        for key in ("normalization_schemes", "use_mask_for_norm"):
            if key in configuration:
                configuration[key] = configuration[key] * contents.channels
    other.plans_file.write_text(json.dumps(plans, indent=4), encoding="utf-8")


def _add_npz(workspace: Workspace) -> None:
    """The same voxels as `3d_small`'s, in the files that nnU-Net wrote until its version 2.5, labels in one byte.

    With labels of two bytes nnU-Net 2.8.1 itself dies by SIGSEGV once it has unpacked them: it maps the file read-only,
    crops without a copy, and its validation transforms write into that.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

    identifier = f"{PLANS}_{_NPZ}"
    workspace.add_small_configuration(name=_NPZ, patch=PATCH, features=FEATURES, data_identifier=identifier)
    source, folder = (workspace.plans_file.with_name(name) for name in (f"{PLANS}_3d_fullres", identifier))
    folder.mkdir(exist_ok=True)
    dataset = nnUNetDatasetBlosc2(str(source))
    for case in dataset.identifiers:
        data, seg, _, properties = dataset.load_case(case)
        nnUNetDatasetNumpy.save_case(data[:], seg[:].astype("int8"), properties, str(folder / case))


def _add_cascade(workspace: Workspace) -> None:
    """Two stages: `3d_lowres` at half the resolution, and one at full resolution that is given what it predicts."""
    plans = json.loads(workspace.plans_file.read_text(encoding="utf-8"))
    identifier = f"{PLANS}_{LOWRES}"
    workspace.add_small_configuration(
        name=LOWRES,
        patch=tuple(size // 2 for size in PATCH),
        features=FEATURES,
        data_identifier=identifier,
        spacing=[2 * edge for edge in plans["configurations"]["3d_fullres"]["spacing"]],
        next_stage=CASCADE,
    )
    workspace.add_small_configuration(name=CASCADE, patch=PATCH, features=FEATURES, previous_stage=LOWRES)
    if not workspace.plans_file.with_name(identifier).is_dir():
        preprocess(workspace, LOWRES)


def predicted(workspace: Workspace, trainer: str) -> Path:
    """Where `3d_lowres` leaves its predictions for the cascade's second stage."""
    return workspace.output_folder(trainer, configuration=LOWRES).parent / "predicted_next_stage" / CASCADE
