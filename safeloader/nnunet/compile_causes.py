"""Is an exception a failure of torch.compile, and which: by its types and by where it was raised.

The rules, in this order:

1. What the device says is no failure of the compiler, whatever is wrapped around it: out of memory, a device-side
   assert, any other CUDA error.
2. An exception of dynamo, inductor, AOTAutograd or Triton, anywhere in the chain of exceptions.
3. Any other exception that is raised while code is built, or by the compiler's own code: a `FileNotFoundError` of the
   subprocess that should have been gcc, a `PermissionError` of the cache.

Types are known by their module, because their names change from torch to torch. The second rule takes in some that are
the user's own: an error in a network or a loss that dynamo traces comes out as dynamo's. That does no harm. The batch
is computed again without the compiler, and then the user's error is raised as it is, before anybody has claimed that it
was the compiler's.

The words come from `safeloader explain`, which knows the same failures from logs. Triton lets the C compiler write to
the console, and all that the exception says is the command: so the compiler is asked again, about a file of one line.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safeloader.faults.explain import explain_text
from safeloader.faults.explain.causes import BY_KEY
from safeloader.faults.explain.causes.compiling import BUILDING, CACHE, CAUSES, WITHOUT
from safeloader.faults.explain.model import Cause

_COMPILERS: Final = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
_DEVICE_TYPES: Final = ("OutOfMemoryError", "AcceleratorError")
_DEVICE_WORDS: Final = re.compile(
    r"(?:CUDA|HIP) (?:out of memory|error)|Triton Error \[\w+\]: (?:out of memory|an illegal)"
    r"|device-side assert|CUDNN_STATUS_|CUBLAS_STATUS_"
)
_BUILDING: Final = re.compile(f"{BUILDING}|{CACHE}")
_COMPILERS_ERROR: Final = re.compile(r"^.*\berror: .*$", re.MULTILINE)
_WRAPPER: Final = re.compile(r"^torch\.[\w.]+: (?=\w+: )")
_UNKNOWN: Final = BY_KEY["compile-failed"]
_UNKNOWN_REMEDY: Final = (
    "To see the whole error: train with nnU-Net's own trainer, which it ends, and `TORCHDYNAMO_VERBOSE=1`"
)
_SOURCE: Final = re.compile(r"\.c(?:c|pp|xx)?$")
_ANSWERS_S: Final = 60
_MAX_EVIDENCE_CHARS: Final = 240
REPEATED: Final = "The same batch was computed again without it"
NOT_COMPILED: Final = "The network is not compiled"


@dataclass(frozen=True)
class CompileFailure:
    """Why torch.compile failed, in words; without the exception, whose traceback holds a step's tensors.

    Attributes:
        title: What went wrong; begins with "torch.compile".
        evidence: What the compiler said, one line.
        remedy: What to do.
    """

    title: str
    evidence: str
    remedy: str

    def line(self, where: str = "", did: str = REPEATED) -> str:
        """One line for the log; `where` is added to the title, as in " in rank 1"; `did` is what was done."""
        return (
            f"SafeLoader: {self.title}{where} ({self.evidence}). {did}, and training goes on without it: same results, "
            f"slower on most GPUs. {self.remedy}. To train without it from the start: `export nnUNet_compile=f`"
        )


def compile_failure(error: BaseException) -> CompileFailure | None:
    """What failed, if `error` is a failure of torch.compile; None if it is anything else."""
    chain = list(_chain(error))
    if any(_is_of_the_device(part) for part in chain) or not any(_is_of_the_compiler(part) for part in chain):
        return None
    text = "".join(traceback.format_exception(error)) + _asked_again(chain[-1])
    diagnosis = explain_text(text)
    found = next((f for f in (diagnosis.primary, *diagnosis.further) if f.cause in CAUSES), None)
    if found is None or found.cause is _UNKNOWN:
        return CompileFailure(_UNKNOWN.title, _shortened(_said(chain[-1])), _UNKNOWN_REMEDY)
    evidence = _WRAPPER.sub("", found.evidence[0].text.strip())
    return CompileFailure(found.cause.title, _shortened(evidence), _remedy(found.cause))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and all that it was raised from, the root last."""
    seen: set[int] = set()
    part: Any = error
    while isinstance(part, BaseException) and id(part) not in seen:
        seen.add(id(part))
        yield part
        # `inner_exception`: what dynamo's and inductor's own wrap, with or without a cause.
        inner = getattr(part, "inner_exception", None)
        part = inner or part.__cause__ or (None if part.__suppress_context__ else part.__context__)


def _is_of_the_device(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names.intersection(_DEVICE_TYPES) or _DEVICE_WORDS.search(str(error)))


def _is_of_the_compiler(error: BaseException) -> bool:
    if any(_of_compilers(cls.__module__) for cls in type(error).__mro__):
        return True
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if _BUILDING.search(f"{frame.f_code.co_filename}:{frame.f_code.co_name}"):
            return True
    return _of_compilers(module)


def _of_compilers(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _COMPILERS)


def _asked_again(root: BaseException) -> str:
    """What the compiler that failed says about a file that only includes Python.h; nothing if it is no compiler."""
    given = root.cmd if isinstance(root, subprocess.CalledProcessError) else None
    command = list(map(str, given)) if isinstance(given, list | tuple) else []
    sources = [argument for argument in command if _SOURCE.search(argument)]
    if len(sources) != 1 or "-o" not in command[:-1]:
        return ""
    with tempfile.TemporaryDirectory(prefix="safeloader-") as folder:
        source = Path(folder, "asked" + Path(sources[0]).suffix)
        source.write_text("#include <Python.h>\n")
        command[command.index(sources[0])] = str(source)
        command[command.index("-o") + 1] = str(Path(folder, "asked.so"))
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWERS_S, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return f"\n{type(error).__name__}: {error}\n"
    return f"\n{asked.stderr}\n"


def _said(root: BaseException) -> str:
    """The line of an exception's text that tells most: the first error of gcc or ld, else the first line."""
    text = str(root).strip()
    error = _COMPILERS_ERROR.search(text)
    return error[0] if error else f"{type(root).__name__}: {text.partition(chr(10))[0]}"


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _MAX_EVIDENCE_CHARS else f"{text[:_MAX_EVIDENCE_CHARS]} […]"


def _remedy(cause: Cause) -> str:
    """What the catalogue says, but for the step that has been taken: to train without the compiler."""
    text = " ".join(step for step in cause.remedy if step != WITHOUT).removeprefix("Or ").rstrip(".")
    return f"To have it: {text[:1].lower()}{text[1:]}"
