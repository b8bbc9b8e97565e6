"""A reader of `inspection`: reads the cases that it is told, and says what is wrong with each.

Lines of JSON: on stdin first what is expected, then a case each; on stdout a list of problems for each case.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from safeloader.nnunet.apart import answers
from safeloader.nnunet.check.cases import Expected, dataset_of, problems
from safeloader.pool.process import leave_interrupts_to_trainer


def main() -> None:
    """Read until stdin ends."""
    leave_interrupts_to_trainer()
    with answers() as lines:
        expected = _expected(json.loads(sys.stdin.readline()))
        dataset = dataset_of(expected)
        for line in sys.stdin:
            print(json.dumps(_look_at(dataset, json.loads(line), expected)), file=lines, flush=True)


def _look_at(dataset: Any, case: str, expected: Expected) -> list[str]:
    try:
        return problems(dataset, case, expected)
    except Exception as error:  # noqa: BLE001 - a broken file may raise anything, and that is the answer
        words = str(error).strip().splitlines()
        return [f"it can't be read: {type(error).__name__}: {words[0] if words else ''}".rstrip(": ")]


def _expected(said: dict[str, Any]) -> Expected:
    spacing = None if said["spacing"] is None else tuple(said["spacing"])
    return Expected(
        **{**said, "spacing": spacing, "labels": tuple(said["labels"]), "transpose": tuple(said["transpose"])}
    )


if __name__ == "__main__":
    main()
