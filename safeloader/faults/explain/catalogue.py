"""All that `safeloader explain` knows, as one page of Markdown that starts from the error texts: `docs/crashes.md`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from safeloader.faults.explain.causes import CAUSES
from safeloader.faults.explain.model import Answer, Cause, Weight

_ECHO: Final = (
    "RuntimeError: One or more background workers are no longer alive. Exiting. "
    "Please check the print statements above for the actual error message"
)
_INTRO: Final = f"""\
# From a stock nnU-Net crash to a running training

Your training ended with

```
{_ECHO}
```

That line follows from any failure, also one of the training process itself: it is never the cause. The cause was
printed before it, often far above, and not into nnU-Net's `training_log_*.txt`: it is in what was printed on the screen
or in the output of the job. Two ways to find it:

* `safeloader explain LOG` reads the whole output, names the first cause and the lines that show it, and what to do.
* Look for one of these texts in your output. Each is linked to what it means.

Most of it needs no change but this one: `safeloader install`, then `nnUNetv2_train … -tr nnUNetTrainerSafeLoader`. A
training that was cut off goes on with `--c` under the same `-tr`. nnU-Net names the output folder after the trainer, so
to continue with SafeLoader what the stock trainer has begun, copy its folder first: `nnUNetTrainer__PLANS__CONFIG` to
`nnUNetTrainerSafeLoader__PLANS__CONFIG`.

This page is printed by `safeloader explain --list`.
"""
_QUOTES: Final = 4
"""Texts that are named of one cause."""
_TOO_COMMON: Final = 7
"""A shorter text ("Error") says nothing by itself: it counts only in its context."""


def page() -> str:
    """The page."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    known = [cause for cause in CAUSES if cause.answer is Answer.KNOWN]
    yield _INTRO
    yield "| in the output | what it is |"
    yield "|---|---|"
    for cause in known:
        for text in _texts(cause):
            yield f"| `{text}` | [{cause.title}](#{cause.key}) |"
    for cause in known:
        yield from _section(cause)


def _section(cause: Cause) -> Iterator[str]:
    yield f'\n<a id="{cause.key}"></a>\n\n## {cause.title}\n'
    texts = _texts(cause)
    if texts:
        yield f"In the output: {', '.join(f'`{text}`' for text in texts)}\n"
    yield f"{cause.what}\n"
    yield from (f"{number}. {step}" for number, step in enumerate(cause.remedy, 1))
    if cause.safeloader:
        yield f"\n**With SafeLoader:** {cause.safeloader}"
    if cause.sources:
        yield f"\nThe same in public threads: {', '.join(cause.sources)}"


def _texts(cause: Cause) -> Sequence[str]:
    """What a reader can look for: texts that say it by themselves, those that end a process first."""
    signs = sorted(cause.signs, key=lambda sign: sign.weight is not Weight.DECISIVE)
    texts = dict.fromkeys(
        sign.text.strip() for sign in signs if len(sign.text.strip()) >= _TOO_COMMON and "`" not in sign.text
    )
    return tuple(texts)[:_QUOTES]
