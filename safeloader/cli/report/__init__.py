"""`safeloader report`: one page about a training, from the files that it has left.

story.py     what the files say        pictures.py   drawn from it        page.py   put together as HTML
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from safeloader.cli.command import Command
from safeloader.errors import ConfigError

PAGE: Final = "safeloader_report.html"


class Report(Command):
    """Make one page about a training, also while it runs, and after it was continued.

    FOLDER is nnU-Net's output folder, fold_X in nnUNet_results. Shows how long training waited in each epoch, beside
    nnU-Net's own epoch times and Dice, with each restart; the memory of trainer and workers; all incidents by cause,
    with their full record; quarantined cases; versions and limits of the machine. Everything is in the one HTML file;
    the pictures are written beside it as PNG as well.

    Exit codes: 0 the page was written, 1 it could not be, 2 the folder holds no training with SafeLoader.
    """

    name = "report"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("folder", metavar="FOLDER", type=Path, help="nnU-Net's output folder: …/fold_X")
        parser.add_argument("-o", dest="out", metavar="DIR", type=Path, help="where to write it (default: FOLDER)")

    def run(self, arguments: argparse.Namespace) -> int:
        """Read, draw, write."""
        from safeloader.cli.report.story import Story  # torch takes seconds to import

        story = Story.read(arguments.folder)
        try:
            from safeloader.cli.report.pictures import pictures
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is needed to draw: pip install matplotlib") from error
        from safeloader.cli.report.page import page

        out = arguments.out or arguments.folder
        drawn = pictures(story)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, png in drawn.items():
                (out / f"safeloader_{name}.png").write_bytes(png)
            (out / PAGE).write_text(page(story, drawn), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"nothing can be written to {out}: {error.strerror}; name another folder with -o"
            ) from error
        print(f"Written: {out / PAGE}")
        return 0
