"""Imports point one way, so that each part can be read, tested and replaced without those above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safeloader

ROOT = Path(safeloader.__file__).parent

LAYERS = [
    {"words", "errors", "config", "killpoints"},
    {"ring", "faults", "report"},
    {"pool"},
    {"runner"},
    {"augmenter"},
    {"testing"},
    {"nnunet", "cli"},
]
"""From the bottom; a module imports only its own layer and those below."""

MAY_IMPORT = {
    "torch": (
        "ring/",
        "pool/worker.py",
        "pool/nursery.py",
        "pool/seeding.py",
        "pool/owned.py",
        "nnunet/",
        "runner.py",
        "augmenter.py",
    ),
    "nnunetv2": ("nnunet/",),
    "rich": ("cli/",),
    "matplotlib": ("cli/",),
    "nilearn": ("nnunet/", "cli/"),
}


def _files() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def _imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Imported modules, and whether only a type checker imports them."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, id(node) in typing_only
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in typing_only


def _layer(part: str) -> int | None:
    return next((number for number, layer in enumerate(LAYERS) if part in layer), None)


@pytest.mark.parametrize(("name", "tree"), list(_files()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(name: str, tree: ast.Module) -> None:
    own = _layer(name.partition("/")[0].removesuffix(".py"))
    for module, typing_only in _imports(tree):
        if module.startswith("safeloader.") and own is not None and not typing_only:
            other = _layer(module.split(".")[1])
            assert other is None or other <= own, f"{name} imports {module}, which is above it"
        allowed = MAY_IMPORT.get(module.partition(".")[0])
        assert allowed is None or name.startswith(allowed), f"{name} may not import {module}"


def test_every_part_has_a_layer() -> None:
    parts = {name.partition("/")[0].removesuffix(".py") for name, _ in _files()} - {"__init__", "__main__"}
    assert parts == set().union(*LAYERS)


def test_importing_safeloader_imports_nothing_of_nnunet_and_starts_nothing() -> None:
    code = (
        "import sys, threading, safeloader; "
        "print([m for m in ('nnunetv2', 'rich', 'matplotlib', 'nilearn', 'nibabel') if m in sys.modules], "
        "threading.active_count())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[0] == "[] 1"


def test_the_command_line_answers_without_torch() -> None:
    """`safeloader doctor` is for machines on which torch is broken, and nobody waits seconds for a help text."""
    heavy = ("torch", "nnunetv2", "matplotlib", "rich")
    code = f"import sys, safeloader.cli; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
