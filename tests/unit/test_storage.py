"""What nnU-Net says about damaged cases, and what is made of it. Every exception comes from a real damaged file."""

from __future__ import annotations

import errno
import faulthandler
import io
import json
import os
import re
import signal
import subprocess
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

from safeloader.faults import storage
from safeloader.faults.storage import ReadFailure, file_of, place, read_failure
from tests import damage
from tests.damage import Case, Kind

STORAGE, CONTENT = ReadFailure.STORAGE, ReadFailure.CONTENT
_SHAPE = (1, 32, 32, 32)


def load(folder: Path, case: Case, kind: Kind = "b2nd") -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Image and labels by the very calls of `nnUNetDataLoader.generate_train_batch`."""
    data, seg, _, properties = damage.open_dataset(folder, kind).load_case(case.identifier)
    assert properties["class_locations"]
    box = [[0, edge] for edge in data.shape[1:]]
    return crop_and_pad_nd(data, box, 0), crop_and_pad_nd(seg, box, -1, cast_cropped_to=np.int16)


def caught(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except BaseException as error:  # noqa: BLE001 - which exceptions there are is what is found out here
        return error
    raise AssertionError("nothing was raised")


# ---- damaged cases ----


@dataclass(frozen=True)
class Row:
    """A damage to one of a case's files ("image", "labels", "properties"), and what comes of it."""

    kind: Kind
    file: str
    damage: Callable[[Path], object]
    error: type[BaseException]
    text: str
    verdict: ReadFailure

    def __str__(self) -> str:
        return f"{self.kind}-{self.file}-{getattr(self.damage, '__name__', '')}-{self.error.__name__}"


def _cut(keep: float) -> Callable[[Path], None]:
    """Keep a share of the file, or so many bytes."""

    def cut(path: Path) -> None:
        damage.truncate(path, int(keep * path.stat().st_size) if 0 < keep < 1 else int(keep))

    cut.__name__ = f"cut_{keep:g}"
    return cut


def _zeros(at: float, count: int) -> Callable[[Path], None]:
    """Zeros from a place (a share of the file) on."""

    def zeros(path: Path) -> None:
        damage.punch_zeros(path, int(at * path.stat().st_size), count)

    zeros.__name__ = f"zeros_{at:g}_{count}"
    return zeros


def _flip(at: int, count: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        damage.flip_bytes(path, at, count)

    flip.__name__ = f"flip_{at}_{count}"
    return flip


NULL, BUFFER, GONE = "returned NULL$", "Error while getting the buffer", "No such file or directory"
NO_MAGIC = r"(contains|containing) pickled"

ROWS = [
    # blosc2: the header and trailer are read when it is opened, the chunks when it is cropped
    Row("b2nd", "image", _cut(0), RuntimeError, NULL, CONTENT),
    Row("b2nd", "image", _cut(100), RuntimeError, NULL, CONTENT),
    Row("b2nd", "image", _cut(0.5), RuntimeError, NULL, CONTENT),
    Row("b2nd", "image", _cut(-10), RuntimeError, NULL, CONTENT),
    Row("b2nd", "labels", _cut(0.9), RuntimeError, NULL, CONTENT),
    Row("b2nd", "image", _zeros(0, 4096), RuntimeError, NULL, CONTENT),
    Row("b2nd", "image", _zeros(0, 10**9), RuntimeError, NULL, CONTENT),
    Row("b2nd", "image", _zeros(0.5, 20000), RuntimeError, BUFFER, CONTENT),
    Row("b2nd", "labels", _zeros(0.5, 4096), RuntimeError, BUFFER, CONTENT),
    Row("b2nd", "image", damage.replace_by_folder, RuntimeError, NULL, STORAGE),
    Row("b2nd", "image", damage.replace_by_eio, RuntimeError, NULL, STORAGE),
    Row("b2nd", "labels", damage.replace_by_eio, RuntimeError, NULL, STORAGE),
    Row("b2nd", "image", damage.replace_by_loop, FileNotFoundError, GONE, STORAGE),
    Row("b2nd", "image", damage.remove, FileNotFoundError, GONE, STORAGE),
    Row("b2nd", "labels", damage.remove, FileNotFoundError, GONE, STORAGE),
    # the properties
    Row("b2nd", "properties", _cut(0), EOFError, "Ran out of input", CONTENT),
    Row("b2nd", "properties", _cut(0.5), Exception, "pickle data was truncated", CONTENT),
    Row("b2nd", "properties", _cut(-1), Exception, "pickle data was truncated", CONTENT),
    Row("b2nd", "properties", _zeros(0, 10**9), Exception, r"invalid load key, '\\x00'", CONTENT),
    Row("b2nd", "properties", _flip(20, 1), UnicodeDecodeError, "invalid start byte", CONTENT),
    Row("b2nd", "properties", _flip(1, 1), ValueError, "unsupported pickle protocol", CONTENT),
    Row("b2nd", "properties", damage.replace_by_folder, IsADirectoryError, "Is a directory", STORAGE),
    Row("b2nd", "properties", damage.replace_by_loop, OSError, "Too many levels of symbolic links", STORAGE),
    Row("b2nd", "properties", damage.replace_by_eio, OSError, "Input/output error", STORAGE),
    Row("b2nd", "properties", damage.remove, FileNotFoundError, GONE, STORAGE),
    # npz: read and checked as a whole
    Row("npz", "image", _cut(0), EOFError, "No data left in file", CONTENT),
    Row("npz", "image", _cut(0.5), zipfile.BadZipFile, "File is not a zip file", CONTENT),
    Row("npz", "image", _cut(-1), zipfile.BadZipFile, "File is not a zip file", CONTENT),
    Row("npz", "image", _zeros(0, 4096), ValueError, NO_MAGIC, CONTENT),
    Row("npz", "image", _zeros(0.5, 4096), zipfile.BadZipFile, "Bad CRC-32", CONTENT),
    Row("npz", "image", _flip(60000, 1), zipfile.BadZipFile, "Bad CRC-32", CONTENT),
    Row("npz", "image", _flip(-67, 1), NotImplementedError, "flag bit", CONTENT),
    Row("npz", "image", damage.replace_by_eio, OSError, "Input/output error", STORAGE),
    Row("npz", "image", damage.remove, FileNotFoundError, GONE, STORAGE),
    # npy: mapped (without the .npy, nnU-Net takes the .npz)
    Row("npy", "image", _cut(0), EOFError, "No data left in file", CONTENT),
    Row("npy", "image", _cut(40), ValueError, "EOF: reading array header", CONTENT),
    Row("npy", "image", _cut(0.5), ValueError, "mmap length is greater than file size", CONTENT),
    Row("npy", "labels", _cut(-1), ValueError, "mmap length is greater than file size", CONTENT),
    Row("npy", "image", _zeros(0, 4096), ValueError, NO_MAGIC, CONTENT),
    Row("npy", "image", _flip(20, 20), ValueError, "Cannot parse header", CONTENT),
    Row("npy", "image", damage.replace_by_eio, OSError, "Input/output error", STORAGE),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_damaged_case(row: Row, tmp_path: Path) -> None:
    folder = tmp_path / "cases"
    case = damage.make_case(folder, "case", kind=row.kind)
    path: Path = getattr(case, row.file)
    restore = row.damage(path)

    error = caught(lambda: load(folder, case, row.kind))

    assert isinstance(error, row.error) and re.search(row.text, str(error))
    assert read_failure(error) is row.verdict
    assert file_of(error) == str(path)
    assert re.fullmatch(r"[\w.]+ at test_storage\.py:\d+ in load", place(error))
    if callable(restore):
        restore()
        data, seg = load(folder, case, row.kind)
        assert np.array_equal(data, case.data) and np.array_equal(seg, case.seg)


@pytest.mark.parametrize("kind", ["b2nd", "npz", "npy"])
@pytest.mark.parametrize("what", ["image", "properties", "folder"])
def test_without_permission(kind: Kind, what: str, tmp_path: Path) -> None:
    case = damage.make_case(tmp_path / "cases", "case", kind=kind)
    dataset = damage.open_dataset(tmp_path / "cases", kind)
    with damage.forbidden(getattr(case, what, case.image.parent)):
        error = caught(lambda: dataset.load_case("case"))
        verdict = read_failure(error)
    assert verdict is STORAGE
    expected = {"b2nd": (RuntimeError, PermissionError, FileNotFoundError)}.get(kind, (PermissionError,))
    assert isinstance(error, expected)
    dataset.load_case("case")


@pytest.mark.parametrize("kind", ["b2nd", "npz", "npy"])
def test_the_whole_folder_is_gone_and_comes_back(kind: Kind, tmp_path: Path) -> None:
    loader = damage.tiny_loader(tmp_path / "cases", kind=kind)
    restore = damage.remove(tmp_path / "cases")
    assert read_failure(caught(lambda: next(loader))) is STORAGE
    restore()
    assert next(loader)["data"].shape == (2, 1, 16, 16, 16)


def test_what_took_the_place_of_a_file_while_it_is_read_is_seen_or_not(tmp_path: Path) -> None:
    case = damage.make_case(tmp_path / "cases", "case")
    other = damage.make_case(tmp_path / "other", "case", seed=1)
    opened = damage.open_dataset(tmp_path / "cases").load_case("case")[0]
    damage.replace(case.image, other.image.read_bytes())
    assert np.array_equal(opened[:], case.data)  # the old file, as long as it is open
    opened = damage.open_dataset(tmp_path / "cases").load_case("case")[0]
    damage.rewrite(case.image, case.image.read_bytes()[:-5000])
    assert read_failure(caught(lambda: load(tmp_path / "cases", case))) is CONTENT  # a writer is not done yet


def _signal_of(function: Callable[[], object]) -> signal.Signals | None:
    """The signal that ends a child which does this, or None."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        with suppress(BaseException):
            function()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return signal.Signals(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None


@pytest.mark.parametrize(("kind", "ends"), [("b2nd", signal.SIGBUS), ("npy", signal.SIGBUS), ("npz", None)])
def test_a_file_that_shrinks_while_it_is_open(kind: Kind, ends: signal.Signals | None, tmp_path: Path) -> None:
    case = damage.make_case(tmp_path / "cases", "case", kind=kind)
    data = damage.open_dataset(tmp_path / "cases", kind).load_case("case")[0]

    def crop() -> object:
        return np.array(crop_and_pad_nd(data, [[0, 32]] * 3, 0))

    damage.truncate(case.image, 0)
    assert _signal_of(crop) == ends


def test_a_flipped_byte_of_an_npy_is_not_noticed_and_one_of_an_npz_is(tmp_path: Path) -> None:
    case = damage.make_case(tmp_path / "npy", "case", kind="npy")
    damage.flip_bytes(case.image, 5000, 1)
    assert (load(tmp_path / "npy", case, "npy")[0] != case.data).sum() == 1
    case = damage.make_case(tmp_path / "npz", "case", kind="npz")
    damage.flip_bytes(case.image, 5000, 1)
    assert read_failure(caught(lambda: load(tmp_path / "npz", case, "npz"))) is CONTENT


def test_a_flipped_byte_of_a_b2nd_is_read_as_other_values_or_raises(tmp_path: Path) -> None:
    case = damage.make_case(tmp_path, "case")
    silent = 0
    for at in range(1000, 61000, 3000):
        damage.flip_bytes(case.image, at, 1)
        with suppress(RuntimeError):
            data, _ = load(tmp_path, case)
            silent += not np.array_equal(data, case.data)
        damage.flip_bytes(case.image, at, 1)
    assert silent > 0  # once this fails, blosc2 has got checksums: say so in the docs


def test_the_real_loader_gives_a_place_that_is_the_same_for_all_cases(tmp_path: Path) -> None:
    loader = damage.tiny_loader(tmp_path, cases=3, batch_size=1)
    for number in range(3):
        damage.truncate(tmp_path / f"case_{number:03d}.b2nd", 1000 * number)
    errors = [caught(lambda: next(loader)) for _ in range(12)]
    assert len({file_of(error) for error in errors}) == 3
    assert {place(error) for error in errors} == {place(errors[0])}
    assert re.fullmatch(r"builtins.RuntimeError at test_storage.py:\d+ in <lambda>", place(errors[0]))


# ---- readers beyond nnU-Net's own ----


def _nifti(path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(8, 8, 8)), np.eye(4)), path)


def _mha(path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.ones((8, 8, 8))), str(path))


READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "a.nii": (_nifti, lambda path: nibabel.load(path).get_fdata()),
    "b.nii.gz": (_nifti, lambda path: nibabel.load(path).get_fdata()),
    "c.mha": (_mha, lambda path: SimpleITK.ReadImage(str(path))),  # of a NIfTI it reads what is left
    "d.pt": (lambda path: torch.save({"a": torch.rand(9)}, path), lambda path: torch.load(path)),
    "e.json": (lambda path: path.write_text('{"a": [1, 2, 3]}'), lambda path: json.load(path.open())),
    "f.npy": (lambda path: np.save(path, np.ones(999)), lambda path: np.load(path)),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("harm", "verdict"),
    [(_cut(0), CONTENT), (_cut(0.7), CONTENT), (damage.remove, STORAGE), (damage.replace_by_eio, STORAGE)],
    ids=["empty", "cut", "gone", "eio"],
)
def test_other_readers(name: str, harm: Callable[[Path], object], verdict: ReadFailure, tmp_path: Path) -> None:
    write, read = READERS[name]
    path = tmp_path / "files" / name
    path.parent.mkdir()
    write(path)
    read(path)
    harm(path)
    error = caught(lambda: read(path))
    assert read_failure(error) is verdict
    assert place(error).endswith("in <lambda>")
    assert file_of(error) in (str(path), None)


# ---- bugs ----


class _Fails:
    """A transform with a bug; called as nnU-Net's are."""

    def __init__(self, bug: Callable[[], object]) -> None:
        self.bug = bug

    def __call__(self, **sample: Any) -> dict[str, Any]:
        self.bug()
        return sample


def _assertion() -> None:
    assert not READERS, "a check of the user's"


def _fallback_with_a_bug() -> None:
    try:
        Path("/nowhere/cache.npy").read_bytes()
    except FileNotFoundError:
        int("the bug")


def _fallback_that_raises_further_in() -> None:
    try:
        Path("/nowhere/cache.npy").read_bytes()
    except FileNotFoundError:
        _raise(RuntimeError("the bug"))


def _raise(error: BaseException) -> None:
    raise error


def _wrong_key_of_an_npz() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, data=np.ones(3))
    buffer.seek(0)
    np.load(buffer)["imgae"]


BUGS: dict[str, tuple[Callable[[], object], type[BaseException]]] = {
    "reshape": (lambda: np.ones(5).reshape(2, 3), ValueError),
    "key": (lambda: {}["image"], KeyError),
    "index": (lambda: [][1], IndexError),
    "torch": (lambda: torch.ones(2) @ torch.ones(3), RuntimeError),
    "type": (lambda: len(3), TypeError),  # type: ignore[arg-type]
    "assert": (_assertion, AssertionError),
    "division": (lambda: 1 // 0, ZeroDivisionError),
    "memory": (lambda: np.empty(1 << 50), MemoryError),
    "import": (lambda: __import__("no_such_module"), ImportError),
    "blosc2 index": (lambda: blosc2.zeros((3, 3))[7, 7], IndexError),
    "npz key": (_wrong_key_of_an_npz, KeyError),
    "json text": (lambda: json.loads("{"), json.JSONDecodeError),
    "array argument": (lambda: np.load(None), TypeError),  # type: ignore[arg-type]
    "closed descriptor": (lambda: os.read(10**6, 1), OSError),
    "no program": (lambda: subprocess.run(["no-such-program"], check=False), FileNotFoundError),
    "broken pipe": (lambda: _raise(BrokenPipeError(errno.EPIPE, "Broken pipe")), BrokenPipeError),
    "no errno": (lambda: _raise(OSError("the user's own")), OSError),
    "timeout of code": (lambda: _raise(TimeoutError()), TimeoutError),
    "fallback": (_fallback_with_a_bug, ValueError),
    "fallback further in": (_fallback_that_raises_further_in, RuntimeError),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_a_transform_is_no_failure_to_read(name: str, tmp_path: Path) -> None:
    bug, kind = BUGS[name]
    loader = damage.tiny_loader(tmp_path, cases=2, batch_size=1, transforms=_Fails(bug))
    errors = [caught(lambda: next(loader)) for _ in range(4)]
    for error in errors:
        assert isinstance(error, kind)
        assert read_failure(error) is None
    assert {place(error) for error in errors} == {place(errors[0])}
    assert re.fullmatch(r"[\w.]+ at test_storage\.py:\d+ in [\w<>]+", place(errors[0]))


def test_a_bug_in_the_loader_names_the_users_line_not_the_librarys(tmp_path: Path) -> None:
    loader = damage.tiny_loader(tmp_path, cases=1, batch_size=1, patch_size=(16, 16, 16))
    loader.get_bbox = lambda shape, force_fg, locations: np.stack([1, [2]])  # type: ignore[assignment]
    error = caught(lambda: next(loader))
    assert read_failure(error) is None
    assert place(error) == f"builtins.ValueError at test_storage.py:{_line('np.stack([1, [2]])')} in <lambda>"


def _line(text: str) -> int:
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


def test_a_file_that_is_missing_counts_as_storage_whoever_opened_it() -> None:
    # A mount that was lost looks just like a wrong name, and a second try costs little.
    error = caught(lambda: Path("/home/user/augmentation.json").read_text())
    assert read_failure(error) is STORAGE
    assert file_of(error) == "/home/user/augmentation.json"


# ---- numbers that can't be had here ----


ANSWERS = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO, errno.EACCES),
    *(errno.EPERM, errno.ENOENT, errno.EBUSY, errno.EAGAIN, errno.ENODATA, errno.EUCLEAN, errno.ESHUTDOWN),
    *(errno.ENOLINK, errno.EKEYEXPIRED, errno.ENXIO),
)
OTHERS = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EBADF, errno.EINVAL),
    *(errno.EPIPE, errno.ECHILD, errno.ESRCH),
)


def test_numbers_of_errors() -> None:
    def judged(numbers: tuple[int, ...]) -> dict[str, ReadFailure | None]:
        return {errno.errorcode[n]: read_failure(OSError(n, os.strerror(n), "/data/case.npz")) for n in numbers}

    assert {name for name, verdict in judged(ANSWERS).items() if verdict is not STORAGE} == set()
    assert {name for name, verdict in judged(OTHERS).items() if verdict is not None} == set()


# ---- chains ----


class CaseError(Exception):
    """A user's own."""


def _from(path: Path) -> None:
    try:
        np.load(path)
    except (OSError, EOFError) as error:
        raise CaseError(path) from error


def _from_none(path: Path) -> None:
    try:
        np.load(path)
    except (OSError, EOFError):
        raise ValueError("bad case") from None


def _plain(path: Path) -> None:
    try:
        np.load(path)
    except (OSError, EOFError):
        raise RuntimeError("bad case")  # noqa: B904 - as users write it


@pytest.mark.parametrize("translate", [_from, _from_none, _plain])
def test_a_translated_failure_is_still_one(translate: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    assert read_failure(caught(lambda: translate(path))) is STORAGE
    assert file_of(caught(lambda: translate(path))) == str(path)
    path.touch()
    assert read_failure(caught(lambda: translate(path))) is CONTENT


def test_what_zipfile_makes_of_an_error_at_the_files_end() -> None:
    class Flaky(io.BytesIO):
        def seek(self, offset: int, whence: int = 0, /) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    error = caught(lambda: zipfile.ZipFile(Flaky()))
    assert isinstance(error, zipfile.BadZipFile)
    assert read_failure(error) is STORAGE


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_closed_and_endless_chains(link: str) -> None:
    first, second = ValueError(1), ValueError(2)
    setattr(first, link, second)
    setattr(second, link, first)
    assert (read_failure(first), file_of(first), place(first)) == (
        None,
        None,
        "builtins.ValueError at an unknown place",
    )
    last: BaseException = OSError(errno.EIO, "")
    chain = [last]
    for number in range(100_000):
        last, before = ValueError(number), last
        setattr(last, link, before)
        chain.append(last)
    assert read_failure(last) is None
    while chain:  # from the far end: Python's own way is recursive
        setattr(chain.pop(), link, None)


# ---- exceptions that defend themselves ----


class _Kind(type):
    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no module")


class Hostile(OSError, metaclass=_Kind):  # noqa: N818 - its name is all there is to it
    """Everything one might ask it raises."""

    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__

    def _no(self) -> Any:
        raise SystemExit

    errno = filename = args = __class__ = __cause__ = __context__ = __traceback__ = property(_no)  # type: ignore


def test_a_hostile_exception() -> None:
    def innocent() -> None:
        raise Hostile(errno.EIO, "no", "/data/case.npz")

    error = caught(innocent)
    assert read_failure(error) is STORAGE
    assert file_of(error) == "/data/case.npz"
    assert re.fullmatch(r"[\w.]*Hostile at test_storage\.py:\d+ in innocent", place(error))


ODD = {
    "no arguments": OSError(),
    "lists": OSError([], []),
    "a float": OSError(5.0, None, object()),
    "a descriptor": OSError("5", "text", 7),
    "bytes": ValueError(b"\xff"),
    "a list": ValueError(["mmap length is greater than file size"]),
    "long": RuntimeError("\ud800" * 10**6),
    "decoding": UnicodeDecodeError("utf-8", b"", 0, 1, ""),
    "interrupt": KeyboardInterrupt(),
    "exit": GeneratorExit(),
}


def test_odd_exceptions() -> None:
    for name, error in ODD.items():
        assert (read_failure(error), file_of(error)) == (None, None), name
        assert place(error).startswith("builtins."), name


def test_a_path_that_can_not_be_one() -> None:
    error = EOFError()
    error.__cause__ = OSError(errno.EINVAL, "", "/data/\0")
    assert read_failure(error) is CONTENT


def test_code_that_was_typed_in_is_the_users() -> None:
    code = compile("def typed(): int('x')", "<ipython-input-3>", "exec")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(code, names)
    assert place(caught(names["typed"])) == "builtins.ValueError at <ipython-input-3>:1 in typed"
    generated: dict[str, Any] = {}
    exec(compile("def wrapped(f): f()", "<__array_function__ internals>", "exec"), generated)

    def call() -> None:
        generated["wrapped"](lambda: int("x"))

    assert place(caught(call)).endswith("in <lambda>")


def test_the_readers_that_are_looked_for_exist() -> None:
    """So that a new version of a library which moves them is noticed here."""
    modules = {module for module, _ in storage._READERS} - {"numpy.lib.npyio", "numpy.core.memmap"}
    for module in modules:
        __import__(module)
