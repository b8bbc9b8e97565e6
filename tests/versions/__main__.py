"""A short training with killed workers under each nnU-Net that SafeLoader supports: `python -m tests.versions`.

Each version gets a virtual environment of its own (about 6 GB, most of it torch; one that is there is used again),
with SafeLoader from this checkout installed in it, and is run twice: with the newest batchgenerators, and with the
oldest that it allows. In each, `inside.py` makes a small brain dataset, has nnU-Net preprocess it, and trains with
`-tr nnUNetTrainerSafeLoaderShort`, a trainer that is built by name, while workers are killed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
OLDEST_BATCHGENERATORS = {"2.5.2": "0.25", "2.6.4": "0.25.1", "2.7.0": "0.25.1", "2.8.1": "0.25.1"}
"""What each version's own metadata allow."""
BESIDE = {"2.5.2": ["torch<2.7", "torchvision"]}
"""What a version needs and its metadata don't say: the schedule of 2.5.2 hands torch's LRScheduler an argument that is
no longer there, whatever the trainer."""
COLUMNS = ("nnunetv2", "batchgenerators", "batchgeneratorsv2", "torch", "numpy", "python")
MEASURED = ("outcome", "batches", "kills", "workers replaced", "Dice")


@dataclass
class Row:
    """One training."""

    versions: dict[str, str]
    measured: dict[str, Any] = field(default_factory=dict)
    last_words: str = ""

    @property
    def good(self) -> bool:
        return self.measured.get("outcome") == "finished" and self.measured["workers replaced"] > 0

    def __str__(self) -> str:
        cells = [self.versions.get(column, "") for column in COLUMNS]
        cells += [str(self.measured.get(column, "–")) for column in MEASURED]
        return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("--versions", nargs="+", default=list(OLDEST_BATCHGENERATORS), help="of nnunetv2")
    parser.add_argument("--folder", type=Path, help="where the environments are kept; default: a temporary one")
    parser.add_argument("--newest-only", action="store_true", help="leave out the oldest batchgenerators")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="safeloader-versions-") as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        rows = [row for version in arguments.versions for row in rows_of(version, folder, arguments.newest_only)]
    print("\n| " + " | ".join([*COLUMNS, *MEASURED]) + " |\n|" + "---|" * (len(COLUMNS) + len(MEASURED)))
    print(*rows, sep="\n")
    for row in rows:
        if not row.good:
            print(f"\nnnunetv2 {row.versions['nnunetv2']}: {row.last_words}")
    return 0 if all(row.good for row in rows) else 1


def rows_of(version: str, folder: Path, newest_only: bool) -> list[Row]:
    """Both trainings of one version."""
    python = environment(version, folder)
    choices = ["newest", *([] if newest_only else filter(None, [OLDEST_BATCHGENERATORS.get(version)]))]
    return [row_of(python, version, choice, folder) for choice in choices]


def environment(version: str, folder: Path) -> Path:
    """The Python of an environment with that nnU-Net and this checkout."""
    home = folder / f"env-{version}"
    python = home / "bin" / "python"
    if not python.exists():
        say(f"nnunetv2 {version}: making {home}")
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip(python, f"nnunetv2=={version}", *BESIDE.get(version, []), "nilearn", "matplotlib", "rich", str(CHECKOUT))
    # The same version number is no reason for pip to take the checkout as it is now.
    pip(python, "--no-deps", "--force-reinstall", str(CHECKOUT))
    return python


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "-q", *arguments], check=True)


def row_of(python: Path, version: str, batchgenerators: str, folder: Path) -> Row:
    """Train once; what went wrong is in the row."""
    wanted = "batchgenerators" if batchgenerators == "newest" else f"batchgenerators=={batchgenerators}"
    pip(python, "-U", wanted)
    installed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True
    )
    versions = {package["name"]: package["version"] for package in json.loads(installed.stdout)}
    shown = {**versions, "nnunetv2": version, "python": ".".join(map(str, sys.version_info[:2]))}
    say(f"nnunetv2 {version} with batchgenerators {versions['batchgenerators']}: training")
    with tempfile.TemporaryDirectory(prefix="work-", dir=folder) as work:
        done = subprocess.run(
            [str(python), str(Path(__file__).with_name("inside.py")), work],
            cwd=work, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
    result = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if result is None:
        return Row(shown, {"outcome": "did not start"}, (done.stdout + done.stderr)[-3000:])
    measured = json.loads(result[1])
    return Row(shown, measured, measured.pop("last_words"))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
