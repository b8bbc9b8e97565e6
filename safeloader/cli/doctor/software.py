"""What is installed: torch and its fit to the GPU, what torch.compile needs, versions, nnU-Net and its folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from safeloader.cli.doctor.check import Check, Finding, breaks, note, ok, unknown, warning
from safeloader.cli.doctor.facts import NNUNET_FOLDERS, PACKAGES, Facts
from safeloader.faults.memory import gib

_RESULTS_NBYTES: Final = 5 << 30
"""A fold of nnU-Net's: two checkpoints of about 250 MB to 1 GB each, and its validation."""

_NETWORK_FILE_SYSTEMS: Final = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "9p",
    "glusterfs",
    "fuse.",
    "virtiofs",
    "wekafs",
)
_OLDEST_FOR_TRITON: Final = (7, 0)


class Torch(Check):
    """Can torch be imported, and does its build fit the GPU and the driver?"""

    title = "torch"

    def look(self, facts: Facts) -> Finding | None:
        """nnU-Net trains on the first GPU that torch finds."""
        found = facts.probed.step("torch")
        if facts.probed.unreached("torch"):
            return _no_time("torch can be imported", "torch", facts)
        if "error" in found:
            return breaks(f"can't be imported: {found['error']}", "pip install --force-reinstall torch")
        built = f"{found['version']}, built for {'CUDA ' + found['cuda'] if found['cuda'] else 'the CPU alone'}"
        if found["gpus"]:
            return _fit(found, built, facts.driver)
        if found["cuda"] and facts.driver:
            what = f"{built}; the driver {facts.driver} is there, and torch finds no GPU: {found['refused']}"
            return breaks(what, "nvidia-smi, and a build of torch that this driver can run: https://pytorch.org")
        if facts.driver:
            what = f"{built}, but there is a GPU (driver {facts.driver})"
            return breaks(what, "install torch for CUDA: https://pytorch.org/get-started/locally")
        return note(
            f"{built}; there is no GPU: a training on the CPU takes weeks",
            "docker run --gpus all …, or srun --gpus=1 …",
        )


def _no_time(what: str, module: str, facts: Facts) -> Finding:
    more = f"time python -c 'import {module}'" if facts.deep else "safeloader doctor --deep has more time"
    return unknown(f"whether {what}: {facts.probed.ended}; the machine is busy, or its storage is slow", more)


def _fit(found: Mapping[str, Any], built: str, driver: str) -> Finding:
    cards = [f"{gpu['name']} ({gib(gpu['memory_nbytes'])})" for gpu in found["gpus"]]
    said = f"{built}, cuDNN {found['cudnn']}, driver {driver or 'unknown'}; {', '.join(cards)}"
    for gpu in found["gpus"]:
        if not runs_on(found["archs"], gpu["capability"]):
            major, minor = gpu["capability"]
            lacks = f"no code for {gpu['name']} (sm_{major}{minor}; it has {', '.join(found['archs'])})"
            what = f"{said}: this build has {lacks}"
            return breaks(what, "install a build of torch for this card: https://pytorch.org/get-started/locally")
    return ok(said)


def runs_on(archs: Sequence[str], capability: Sequence[int]) -> bool:
    """Whether code for `archs` ("sm_80", "compute_90") runs on a card of this capability (major, minor).

    Compiled code runs on cards of its major version from its minor version on; PTX on all later ones. Source: NVIDIA's
    CUDA C++ Programming Guide, "Binary compatibility" and "PTX compatibility".
    """
    if not any(arch.startswith(("sm_", "compute_")) for arch in archs):
        return True  # not CUDA
    for arch in archs:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("abcdefgh")
        if not digits.isdecimal():
            continue
        major, minor = divmod(int(digits), 10)
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= tuple(capability):
            return True
    return False


class Compile(Check):
    """Has torch.compile what it needs: a C compiler, Python's headers, a card that is new enough, a place to write?

    nnU-Net compiles its network unless it trains on the CPU. Where that fails, a stock training ends.
    """

    title = "torch.compile"

    def look(self, facts: Facts) -> Finding | None:
        """What `--deep` has tried counts more than what is there."""
        wanted = facts.environ.get("nnUNet_compile", "true").lower() in ("true", "1", "t")
        gpus = facts.probed.step("torch").get("gpus", [])
        off = "export nnUNet_compile=false"
        if "compile" in facts.probed.steps:
            return _tried(facts.probed.step("compile"), off)
        if "error" in facts.probed.step("torch"):
            return None  # for which GPU isn't known
        if not wanted or not gpus:
            why = "is switched off (nnUNet_compile)" if not wanted else "is not used by nnU-Net without a GPU"
            return ok(f"{why}")
        if tuple(gpus[0]["capability"]) < _OLDEST_FOR_TRITON:
            return warning(f"does not support {gpus[0]['name']}", off)
        cache = facts.compile_cache
        lacks = {
            "no C compiler is on the PATH": (not facts.compiler, "apt install gcc, or module load gcc"),
            "Python.h is missing": (not facts.headers, "apt install python3-dev, or conda install python"),
            f"nothing can be written to {cache.path} ({cache.refused or 'it is not there'})": (
                not cache.exists or bool(cache.refused),
                "export TORCHINDUCTOR_CACHE_DIR=~/.cache/torchinductor",
            ),
        }
        for what, (missing, remedy) in lacks.items():
            if missing:
                return warning(f"will fail: {what}", f"{remedy} (or {off})")
        return ok(f"{facts.compiler} and Python.h are there; --deep tries it")


def _tried(tried: Mapping[str, Any], off: str) -> Finding:
    if "error" in tried:
        return warning(f"a small function could not be compiled: {tried['error']}", f"safeloader explain LOG, or {off}")
    return ok(f"a small function was compiled for {tried['device']}")


class Versions(Check):
    """Which versions are installed, and which of them are known to break trainings?"""

    title = "versions"

    def look(self, facts: Facts) -> Finding | None:
        """Known from public threads; see `_BAD`."""
        have = facts.versions
        said = ", ".join(f"{name} {have[name]}" for name in PACKAGES if name in have)
        if "nnunetv2" not in have:
            return breaks(f"nnU-Net is not installed; {said}", "pip install nnunetv2")
        for bad in _BAD:
            if bad.package in have and bad.first <= _numbers(have[bad.package]) < bad.end:
                return warning(f"{bad.package} {have[bad.package]} {bad.why}; {said}", bad.remedy)
        return ok(said)


@dataclass(frozen=True)
class _Bad:
    """Versions of a package from `first` to before `end` that break trainings."""

    package: str
    first: tuple[int, ...]
    end: tuple[int, ...]
    why: str
    remedy: str


_BAD: Final = (
    _Bad("nnunetv2", (0,), (2, 5), "is older than what SafeLoader works with (2.5)", "pip install -U nnunetv2"),
    _Bad(
        "torch",
        (2, 9),
        (2, 10),
        "computes 3D convolutions in mixed precision very slowly, and nnU-Net 2.8 refuses it",
        "pip install 'torch!=2.9.*'",
    ),
    _Bad(
        "threadpoolctl",
        (0,),
        (3, 1),
        "fails on newer BLAS libraries in each stock worker (nnUNet#1406, #2166)",
        "pip install -U threadpoolctl",
    ),
    _Bad(
        "blosc2",
        (0,),
        (2, 7, 1),
        "crashes now and then while it compresses (python-blosc2#167)",
        "pip install -U blosc2",
    ),
)


def _numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, "2.9.0+cu126" as (2, 9, 0); stops at the first part that is no number."""
    numbers: list[int] = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


class Fit(Check):
    """Do the installed versions fit each other, as each package says of the others?"""

    title = "dependencies"

    def look(self, facts: Facts) -> Finding | None:
        """Of what `pip check` complains about, what a training uses."""
        if facts.complaints is None:
            return unknown("pip gave no answer", "python -m pip check")
        about = [line for line in facts.complaints if any(name in line.split() for name in PACKAGES)]
        if about:
            more = f" (and {len(about) - 1} more)" if len(about) > 1 else ""
            return warning(f"pip check: {about[0]}{more}", "pip install -U nnunetv2, in an environment of its own")
        return ok("pip check has no complaint about them")


class Blosc2(Check):
    """Can the library be imported that nnU-Net reads its preprocessed files with?"""

    title = "blosc2"

    def look(self, facts: Facts) -> Finding | None:
        """It compiles against numpy 2, and fails with numpy 1 (nnUNet#2913)."""
        found = facts.probed.step("blosc2")
        if facts.probed.unreached("blosc2"):
            return _no_time("blosc2 can be imported", "blosc2", facts)
        if "error" in found:
            return breaks(f"can't be imported: {found['error']}", "pip install -U blosc2 numpy")
        return ok(f"{found['version']} can be imported")


class Trainer(Check):
    """Does nnU-Net find the trainer that `-tr` names?"""

    title = "trainer"

    def look(self, facts: Facts) -> Finding | None:
        """Asked in nnU-Net's own way."""
        found = facts.probed.step("trainer")
        if "error" not in found:
            return ok(f"nnU-Net finds {found['found']}")
        if "Could not find requested nnunet trainer" in found["error"]:
            return breaks(f"nnU-Net does not find {facts.trainer}", "safeloader install")
        if facts.probed.unreached("trainer"):
            if "SafeLoader" in facts.trainer and not facts.shim:
                return breaks(f"nothing leads nnU-Net to {facts.trainer}", "safeloader install")
            return _no_time(f"nnU-Net finds {facts.trainer}", "nnunetv2", facts)
        return breaks(f"nnU-Net can't be imported: {found['error']}", "pip install --force-reinstall nnunetv2")


class Folders(Check):
    """Are nnU-Net's folders named, there, and can be written to? `nnUNet_raw` is needed to preprocess only."""

    title = "folders"

    def look(self, facts: Facts) -> Finding | None:
        """A training reads `nnUNet_preprocessed`, and writes a split there, and all else into `nnUNet_results`."""
        unset = [name for name in NNUNET_FOLDERS if name not in facts.folders and name != "nnUNet_raw"]
        if unset:
            names = " and ".join(unset)
            return breaks(f"{names} not set", "; ".join(f"export {name}=/path/to/{name}" for name in unset))
        for name, folder in facts.folders.items():
            if not folder.exists:
                return breaks(f"{name}={folder.path} is no folder", f"mkdir -p '{folder.path}'")
        results, preprocessed = facts.folders["nnUNet_results"], facts.folders["nnUNet_preprocessed"]
        if results.refused:
            return breaks(
                f"nothing can be written to nnUNet_results={results.path}: {results.refused}", "export nnUNet_results=…"
            )
        if results.mounted is not None and results.mounted.free_nbytes < _RESULTS_NBYTES:
            what = f"only {gib(results.mounted.free_nbytes)} are free in nnUNet_results={results.path}"
            return warning(what, f"df -h '{results.path}'; a fold takes 1 to 5 GiB")
        kind = preprocessed.mounted.kind if preprocessed.mounted is not None else ""
        if kind.startswith(_NETWORK_FILE_SYSTEMS):
            what = f"nnUNet_preprocessed={preprocessed.path} is on {kind}: each wait for storage is a wait for batches"
            return note(what, "copy it to a local disk of the node before training, for example to $TMPDIR")
        free = gib(results.mounted.free_nbytes) if results.mounted is not None else "an unknown size"
        return ok(f"they are there; {free} free for results")
