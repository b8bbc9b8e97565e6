"""Which packages are installed, in which version."""

from __future__ import annotations

from importlib import metadata


def version_of(package: str) -> str | None:
    """Its version; None if it is not installed, as a checkout that is only on `sys.path`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions_of(*packages: str) -> dict[str, str]:
    """Those of the packages that are installed, in the given order."""
    return {package: version for package in packages if (version := version_of(package)) is not None}
