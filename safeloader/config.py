"""Every option once: default, unit, bounds and environment variable.

An explicit argument wins over the environment variable, which wins over the default. `resolve` is the only way
to options, so that a bad value always gives the same one-line `ConfigError`, wherever it came from.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Final

from safeloader.errors import ConfigError


class StartMethod(str, Enum):
    """How workers come into being."""

    AUTO = "auto"
    """From the clean nursery; from a nursery forked from the trainer if the loader can't be pickled."""
    CLEAN = "clean"
    """Only from the clean nursery."""
    FORKED = "forked"
    """Only from a nursery forked from the trainer, as the stock augmenter does."""


class OnBadCase(str, Enum):
    """What two strikes on one case lead to."""

    QUARANTINE = "quarantine"
    """It is no longer drawn; at most 5 % of the cases."""
    RAISE = "raise"
    """The stream ends with an error."""
    RETRY = "retry"
    """It is tried again and again: nothing ever changes in the stream, and a case that stays bad stops it."""


class Pin(str, Enum):
    """How `pin_memory=True` is done."""

    COPY = "copy"
    """Each tensor is copied into pinned memory."""
    REGISTER = "register"
    """The slots are registered with CUDA, and tensors in them are pinned as they are."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a `SafeAugmenter` can be told beyond the stock constructor; `OPTIONS` documents each.

    Frozen: options of a running pool never change.
    """

    seed: int | None
    stream: int
    name: str
    max_restarts: int | None
    restart_window_s: float
    backoff_first_s: float
    backoff_max_s: float
    start_method: StartMethod
    loader_max_mib: int
    hang_timeout_s: float | None
    hang_timeout_first_s: float
    hang_timeout_max_s: float | None
    on_bad_case: OnBadCase
    outage_timeout_s: float
    grow_back_s: float
    rest_after_s: float
    recycle_growth_mib: int
    slow_warning_s: float
    folder: str | None
    audit: bool
    pin: Pin


@dataclass(frozen=True)
class Option:
    """One option's documentation and bounds."""

    default: Any
    kind: type
    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None

    def env(self, name: str) -> str:
        """The environment variable of the option called `name`."""
        return f"SAFELOADER_{name.upper()}"


OPTIONS: Final[Mapping[str, Option]] = {
    "seed": Option(
        None, int, "root seed of the stream; None takes it from `seeds`, or draws one and reports it", minimum=0
    ),
    "stream": Option(
        0, int, "which stream of the root seed: streams never share random numbers", minimum=0, maximum=2**32 - 1
    ),
    "name": Option("loader", str, "what messages and process names call this pool"),
    "max_restarts": Option(
        None,
        int,
        "deaths allowed in the window with no batch delivered in between; None is 5 + 2 x workers",
        minimum=0,
    ),
    "restart_window_s": Option(600.0, float, "window of the restart intensity", "s", minimum=1),
    "backoff_first_s": Option(
        0.1, float, "wait before a worker's second restart in a row; it doubles from there", "s", minimum=0
    ),
    "backoff_max_s": Option(5.0, float, "longest wait before a restart", "s", minimum=0, maximum=600),
    "start_method": Option(StartMethod.AUTO, StartMethod, "auto, clean or forked: see the nursery"),
    "loader_max_mib": Option(
        256, int, "a loader whose pickle is larger is forked from the trainer instead", "MiB", minimum=0
    ),
    "hang_timeout_s": Option(
        None,
        float,
        "a worker without progress for so long is replaced; None is 20 x the 99th percentile of the batches' times, "
        "at least 120 s; inf switches it off",
        "s",
        minimum=0.05,
    ),
    "hang_timeout_first_s": Option(
        300.0, float, "at least this for a worker's start and first batch", "s", minimum=0.05
    ),
    "hang_timeout_max_s": Option(
        None,
        float,
        "at most this, whatever else is said; None is 240 in distributed training (NCCL waits 600 s), else no limit",
        "s",
        minimum=0.05,
    ),
    "on_bad_case": Option(OnBadCase.QUARANTINE, OnBadCase, "after two strikes on one case: quarantine, raise or retry"),
    "outage_timeout_s": Option(
        3600.0, float, "how long storage may fail for many cases at once before that is an error", "s", minimum=0
    ),
    "grow_back_s": Option(
        600.0, float, "after so long without trouble, one worker more is tried again", "s", minimum=0.05
    ),
    "rest_after_s": Option(
        20.0,
        float,
        "a worker without anything to do for so long leaves, and is started again when it is needed; inf switches it "
        "off",
        "s",
        minimum=0.05,
    ),
    "recycle_growth_mib": Option(
        2048, int, "a worker whose memory has grown by more than this since its 8th batch is replaced", "MiB", minimum=1
    ),
    "slow_warning_s": Option(
        30.0, float, "a wait for a batch that is longer gets a line in the log", "s", minimum=0.05
    ),
    "folder": Option(None, str, "where incidents and quarantined cases are written; None is nowhere"),
    "audit": Option(
        False, bool, "write a line with a checksum per delivered batch into the folder, for `safeloader audit`"
    ),
    "pin": Option(Pin.REGISTER, Pin, "how `pin_memory=True` is done: register the slots with CUDA, or copy"),
}

_TRUTHS: Final = {"1": True, "true": True, "0": False, "false": False}

assert set(OPTIONS) == {f.name for f in fields(Options)}, "every option has one field and one entry"


def resolve(given: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Options:
    """Build options from explicit arguments, the environment and the defaults.

    Args:
        given: explicit arguments by name.
        environ: the environment to read; None is `os.environ`.

    Raises:
        ConfigError: an unknown option, a value of the wrong type or out of bounds, or options that need each other.
    """
    env = os.environ if environ is None else environ
    for name in given:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(OPTIONS))}"
            raise ConfigError(f"unknown option {name!r}: {hint}")
    values: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if given.get(name) is not None:
            values[name] = _checked(option, given[name], source=f"{name}={given[name]!r}")
        elif env.get(option.env(name)):
            text = env[option.env(name)]
            values[name] = _checked(option, text, source=f"{option.env(name)}={text}")
        else:
            values[name] = option.default
    options = Options(**values)
    if options.audit and not options.folder:
        raise ConfigError(
            "audit is on, and there is no folder to write it into: give the option `folder` (SAFELOADER_FOLDER), or "
            "switch it off (SAFELOADER_AUDIT=0)"
        )
    return options


def _checked(option: Option, value: Any, *, source: str) -> Any:
    """Convert and bound one value; `source` is how the user wrote it."""
    converted: Any
    try:
        if option.kind is int and (isinstance(value, bool) or (isinstance(value, float) and value % 1)):
            raise ValueError
        converted = _TRUTHS[str(value).strip().lower()] if option.kind is bool else option.kind(value)
    except (TypeError, ValueError, KeyError):
        raise ConfigError(f"{source}: expected {_expected(option.kind)} ({option.help})") from None
    unit = f" {option.unit}" if option.unit else ""
    if option.minimum is not None and not converted >= option.minimum:
        raise ConfigError(f"{source}: must be at least {option.minimum:g}{unit} ({option.help})")
    if option.maximum is not None and not converted <= option.maximum:
        raise ConfigError(f"{source}: must be at most {option.maximum:g}{unit} ({option.help})")
    return converted


def _expected(kind: type) -> str:
    if kind is bool:
        return " or ".join(_TRUTHS)
    return " or ".join(member.value for member in kind) if issubclass(kind, Enum) else kind.__name__
