"""SafeLoader in front of any trainer that nnU-Net finds, by name: `-tr nnUNetTrainerSafeLoader_250epochs`.

    asked for                            the base trainers that are looked for, in this order
    nnUNetTrainerSafeLoader_250epochs    nnUNetTrainer_250epochs, nnUNetTrainer250epochs
    nnUNetTrainerSafeLoader_DA5          nnUNetTrainer_DA5, nnUNetTrainerDA5
    nnUNetTrainerDA5SafeLoader           nnUNetTrainerDA5
    SafeLoader_MyTrainer                 _MyTrainer, MyTrainer

"SafeLoader" is taken out of the name. The first base is what is left as it stands, so any trainer's name with
"SafeLoader" behind it means that trainer and no other. If nnU-Net has none of that name, an underscore at the place is
added or left out. A class that somebody has written under the very name that is asked for always comes first.

The classes say that they live in `safeloader.nnunet.trainer`, whose module-level `__getattr__` leads here: so each DDP
rank, and whoever unpickles one, builds it for himself, of the base that nnU-Net finds there.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import io
import logging
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from safeloader.errors import ConfigError
from safeloader.nnunet.mixin import SafeLoaderMixin

MARK: Final = "SafeLoader"
"""What is taken out of a name."""
TRAINERS_MODULE: Final = "safeloader.nnunet.trainer"
_PACKAGE: Final = "nnunetv2.training.nnUNetTrainer"
_NOT_FOUND: Final = "Could not find requested nnunet trainer"

logger = logging.getLogger("safeloader")


def answer(name: str) -> type:
    """What the shim says if nnU-Net asks it for `name`.

    Raises:
        AttributeError: nothing: the class is written elsewhere, and nnU-Net goes on searching; or it can't be built.
        ConfigError: two base trainers fit.
    """
    if _is_written(name):
        raise AttributeError(name)
    return trainer_class(name)


def trainer_class(name: str) -> type:
    """The class called `name`: our mixin before a trainer of nnU-Net's or the user's. Always the same object.

    Raises:
        AttributeError: nnU-Net has no such trainer; a line in the log says which ones were looked for.
        ConfigError: two fit.
    """
    if MARK not in name:
        raise AttributeError(f"module {TRAINERS_MODULE!r} has no attribute {name!r}")
    return _built(name, _external_folders())


def base_names(name: str) -> tuple[str, ...]:
    """The names of the trainers that `name` may mean, the preferred one first."""
    before, _, after = name.partition(MARK)
    bare = before.rstrip("_"), after.lstrip("_")
    spellings = (before + after, "_".join(filter(None, bare)), "".join(bare))
    return tuple(dict.fromkeys(filter(None, spellings)))


@functools.cache
def _built(name: str, _external: tuple[str, ...]) -> type:
    literal, *others = base_names(name) or ("",)
    base: type | None = _found(literal)
    if base is None:
        fitting = {other: found for other in others if (found := _found(other)) is not None}
        if len(fitting) > 1:
            one, two = fitting
            raise ConfigError(
                f"-tr {name} may mean {one} or {two}, and nnU-Net has both: write {one}{MARK} or {two}{MARK}"
            )
        base = next(iter(fitting.values()), None)
    if base is None:
        _say_once(_nothing_found(name))
        raise AttributeError(name)
    if issubclass(base, SafeLoaderMixin):
        return base
    about = f"`{base.__name__}` with SafeLoader, built by name."
    return type(name, (SafeLoaderMixin, base), {"__module__": TRAINERS_MODULE, "__doc__": about})


def _found(name: str) -> Any:
    """The trainer class that nnU-Net finds under this name, or None. What its search prints is not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
        except ImportError:  # before nnU-Net 2.8.0
            from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

            return recursive_find_python_class(str(_package_folder()), name, _PACKAGE)
        try:
            return recursive_find_trainer_class_by_name(name)
        except RuntimeError as error:
            if str(error).startswith(_NOT_FOUND):
                return None
            raise  # of a module that was imported in the search


def _package_folder() -> Path:
    import nnunetv2

    return Path(nnunetv2.__path__[0], "training", "nnUNetTrainer")


def _external_folders() -> tuple[str, ...]:
    """What nnU-Net 2.8.0 and later searches after its own package."""
    named = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)  # noqa: SIM112 - nnU-Net's spelling
    return tuple(folder for folder in named if folder.strip())


def _is_written(name: str) -> bool:
    """Whether a module that nnU-Net searches has something of this name. None is imported for it."""
    folders = (str(_package_folder()), *_external_folders())
    return any(_binds(path, name) for folder in folders for path in _modules(folder))


def _modules(folder: str) -> Iterator[Path]:
    """The modules that nnU-Net's search would import, in packages below as well."""
    for _, module, is_package in pkgutil.iter_modules([folder]):
        if is_package:
            yield from _modules(os.path.join(folder, module))
        else:
            yield Path(folder, f"{module}.py")


def _binds(path: Path, name: str) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        # Most files don't have the word in them, and are not parsed.
        return name in text and any(name in _bound(node) for node in ast.walk(ast.parse(text)))
    except (OSError, ValueError, SyntaxError):  # a compiled module, or one that nnU-Net's import will complain about
        return False


def _bound(node: ast.AST) -> tuple[str, ...]:
    """The names that a class statement, an import or an assignment gives a value to."""
    match node:
        case ast.ClassDef(name=name):
            return (name,)
        case ast.ImportFrom(names=names):
            return tuple(alias.asname or alias.name for alias in names)
        case ast.Name(id=name, ctx=ast.Store()):
            return (name,)
    return ()


def _nothing_found(name: str) -> str:
    wanted = base_names(name)
    near = [match for base in wanted for match in difflib.get_close_matches(base, _known(), n=3, cutoff=0.8)]
    similar = ", ".join(dict.fromkeys(f"{base} (-tr {base}{MARK})" for base in near)) or "none"
    return (
        f"SafeLoader: -tr {name} stands for SafeLoader before the trainer {' or '.join(wanted)}, and nnU-Net finds no "
        f"trainer of that name. Similar ones: {similar}."
    )


def _known() -> list[str]:
    """The names of the trainers that the search has imported."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    names, left = set(), [nnUNetTrainer]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        if not issubclass(cls, SafeLoaderMixin):
            names.add(cls.__name__)
    return sorted(names)


@functools.cache
def _say_once(message: str) -> None:
    """Nnu-Net may ask more than one shim."""
    logger.warning("%s", message)
