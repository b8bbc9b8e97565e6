"""Which nnU-Net SafeLoader works with: 2.5 and later; an older one is refused when a training starts.

`python -m tests.versions` trains under each. Until 2.4, nnU-Net wraps its loaders in an augmenter class of its own,
which would run unprotected.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Final

from safeloader.errors import ConfigError
from safeloader.nnunet.upstream import Trainer

OLDEST: Final = (2, 5)


class VersionCheck(Trainer):
    """Mixed in before a trainer class: does not start under an nnU-Net that is too old."""

    def initialize(self) -> None:
        """Check the version, and go on.

        Raises:
            ConfigError: it is too old.
        """
        refuse_old()
        super().initialize()


def refuse_old() -> None:
    """Do nothing if nnU-Net is new enough, or its version is not known.

    Raises:
        ConfigError: it is too old.
    """
    version = installed()
    if version is not None and version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(
            f"nnunetv2 {metadata.version('nnunetv2')} is installed, and SafeLoader needs {oldest} or later: "
            "`pip install -U nnunetv2`, or train with a trainer that has no SafeLoader in its name"
        )


def installed() -> tuple[int, int] | None:
    """The first two numbers of nnU-Net's version; None if nobody knows it, as of a folder on the search path."""
    try:
        numbers = re.match(r"(\d+)\.(\d+)", metadata.version("nnunetv2"))
    except metadata.PackageNotFoundError:
        return None
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))
