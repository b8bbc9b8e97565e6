"""Compilers as they are on machines where something is missing, for the tests of torch.compile."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path


def without_headers(folder: Path) -> str:
    """Those of this machine where python3-dev is not installed, in `folder`; returns a search path with it."""
    headers = sorted({sysconfig.get_paths()[name] for name in ("include", "platinclude")})
    real = os.environ["PATH"]
    for name in ("gcc", "cc", "clang", "g++"):
        compiler = folder / name
        compiler.write_text(
            f"#!{sys.executable}\nimport os, sys\n"
            f"args = [a for a in sys.argv[1:] if not any(h in a for h in {headers!r})]\n"
            f"os.execvpe({name!r}, [{name!r}, *args], {{**os.environ, 'PATH': {real!r}}})\n"
        )
        compiler.chmod(0o755)
    return f"{folder}{os.pathsep}{real}"
