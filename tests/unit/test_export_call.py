"""What the names of a function's parameters tell about a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safeloader.nnunet.export.call import Brief, Call


def export_prediction_from_logits(
    predicted_array_or_file: Any,
    properties_dict: dict[str, Any],
    output_file_truncated: str,
    save_probabilities: bool = False,
    num_threads_torch: int = 8,
) -> tuple[str, bool, int]:
    return output_file_truncated, save_probabilities, num_threads_torch


def resample_and_save(
    predicted: Any, target_shape: list[int], output_file: str, num_threads_torch: int = 8
) -> tuple[str, int]:
    return output_file, num_threads_torch


def compute_metrics(reference_file: str, prediction_file: str) -> str:
    return prediction_file


LOGITS = torch.zeros((3, 4, 5, 6), dtype=torch.float16)
PROPERTIES = {"shape_after_cropping_and_before_resampling": (8, 10, 12)}


def test_an_export() -> None:
    call = Call.of(export_prediction_from_logits, (LOGITS, PROPERTIES, "/out/validation/case.1", True))
    needed_nbytes = 3 * (4 * 5 * 6 + 8 * 10 * 12) * 8
    target = Path("/out/validation/case.1")
    assert call.brief() == Brief("the export of case case.1", "case.1", target, True, needed_nbytes)
    assert call.writing_to("/tmp/7/case.1").single_threaded().make() == ("/tmp/7/case.1", True, 1)
    assert call.make() == ("/out/validation/case.1", True, 8), "the call itself stays as it is"


def test_an_argument_before_it_may_be_left_out() -> None:
    call = Call.of(export_prediction_from_logits, (LOGITS, {}, "/out/case"))
    assert call.single_threaded().make() == ("/out/case", False, 1)
    assert call.brief().needed_nbytes == 2 * LOGITS.numel() * 8, "nothing is known of the shape it is resampled to"


def test_an_export_for_the_next_stage() -> None:
    call = Call.of(resample_and_save, (LOGITS, [8, 5, 6], "/predicted_next_stage/3d_cascade/case", 4))
    brief = call.brief()
    assert (brief.title, brief.case) == ("the export of case case for 3d_cascade", "case")
    assert (brief.probabilities, brief.needed_nbytes) == (None, 3 * 5 * 6 * (4 + 8) * 8)
    assert call.single_threaded().make()[1] == 1


def test_an_evaluation_writes_nothing() -> None:
    brief = Call.of(compute_metrics, ("/gt/case.nii.gz", "/out/case.nii.gz")).brief()
    assert brief == Brief("the evaluation of case.nii.gz", "case.nii.gz", None, None, None)


def test_a_function_in_c_is_called_as_it_is() -> None:
    call = Call.of(max, (1, 2))
    assert call.brief() == Brief("max", "max", None, None, None)
    assert call.single_threaded().make() == 2
