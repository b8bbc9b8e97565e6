"""Nnu-Net's export and evaluation with a fault on the way: importable in export processes by name."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.inference.export_prediction import export_prediction_from_logits, resample_and_save

from tests import export_jobs

FOLDER_ENV = "SAFELOADER_TEST_ORDERS"

_signature_of = functools.partial(functools.wraps, assigned=())
"""Not its name as well: pickle would find the original by that."""


def _obey(path: str) -> None:
    export_jobs.orders(Path(os.environ[FOLDER_ENV])).obey(os.path.basename(path))


@_signature_of(export_prediction_from_logits)
def export(*args: Any, **kwargs: Any) -> None:
    Path(args[5] + ".nii.gz").write_bytes(b"half a file")
    _obey(args[5])
    export_prediction_from_logits(*args, **kwargs)


@_signature_of(resample_and_save)
def export_next_stage(*args: Any, **kwargs: Any) -> None:
    Path(args[2] + ".b2nd").write_bytes(b"half a file")
    _obey(f"next-{os.path.basename(args[2])}")
    resample_and_save(*args, **kwargs)


@_signature_of(compute_metrics)
def evaluate(*args: Any, **kwargs: Any) -> dict[str, Any]:
    _obey(args[1])
    result: dict[str, Any] = compute_metrics(*args, **kwargs)
    return result
