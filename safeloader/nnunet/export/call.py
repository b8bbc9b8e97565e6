"""A call that is to be made in an export process, and what the names of the function's parameters tell about it.

nnU-Net's method gives its pool a function and arguments: `export_prediction_from_logits` and `resample_and_save` write
files, `compute_metrics` reads some. Their parameters' names say where the files go, which case it is, and how many
threads may be used. A function that has none of these names is called as it is.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

_OUTPUT: Final = ("output_file_truncated", "output_file")
_THREADS: Final = "num_threads_torch"
_READ: Final = "prediction_file"
_PROBABILITIES: Final = "save_probabilities"
_NEXT_STAGE: Final = "target_shape"
_PROPERTIES: Final = "properties_dict"
_EXPORT_SHAPE: Final = "shape_after_cropping_and_before_resampling"
_FLOAT64_NBYTES: Final = 8


@dataclass(frozen=True)
class Brief:
    """What is told about a call.

    Attributes:
        title: what it does, as the subject of a sentence. case: the case that it is about.
        target: the path of what it writes, in most cases without the ending; None if it writes nothing.
        probabilities: whether it writes probabilities as well; None for what has none.
        needed_nbytes: the memory that it takes at least, or None if that can't be told.
    """

    title: str
    case: str
    target: Path | None
    probabilities: bool | None
    needed_nbytes: int | None


@dataclass(frozen=True)
class Call:
    """A function, its arguments, and where each parameter's argument is."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    places: Mapping[str, int]
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: Sequence[Any]) -> Call:
        """What a pool's `starmap` is given for one call."""
        try:
            names = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):  # a function in C
            names = []
        return cls(function, tuple(arguments), {name: place for place, name in enumerate(names)})

    def _get(self, name: str) -> Any:
        place = self.places.get(name)
        return None if place is None or place >= len(self.arguments) else self.arguments[place]

    def _with(self, name: str, value: Any) -> Call:
        """The same with another argument."""
        place = self.places[name]
        if place >= len(self.arguments):  # it was left to its default
            return replace(self, keywords={**self.keywords, name: value})
        return replace(self, arguments=(*self.arguments[:place], value, *self.arguments[place + 1 :]))

    @property
    def output(self) -> str | None:
        """The path of what it writes, in most cases without the ending; None if it writes nothing that we know of."""
        found = next((self._get(name) for name in _OUTPUT if isinstance(self._get(name), str)), None)
        return None if found is None else str(found)

    def writing_to(self, path: str) -> Call:
        """The same call with another output path."""
        name = next(name for name in _OUTPUT if name in self.places)
        return self._with(name, path)

    def single_threaded(self) -> Call:
        """The same call with one thread, if that can be asked for."""
        return self._with(_THREADS, 1) if _THREADS in self.places else self

    def make(self) -> Any:
        """Call it here."""
        return self.function(*self.arguments, **self.keywords)

    def brief(self) -> Brief:
        """What is told about it."""
        return Brief(
            title=self._title(),
            case=self._case(),
            target=None if self.output is None else Path(self.output),
            probabilities=bool(self._get(_PROBABILITIES)) if _PROBABILITIES in self.places else None,
            needed_nbytes=self._needed_nbytes(),
        )

    def _case(self) -> str:
        path = self.output or self._get(_READ)
        return os.path.basename(path) if path else getattr(self.function, "__name__", repr(self.function))

    def _title(self) -> str:
        if self.output is None:
            return f"the evaluation of {self._case()}" if self._get(_READ) else self._case()
        if _NEXT_STAGE in self.places:
            return f"the export of case {self._case()} for {os.path.basename(os.path.dirname(self.output))}"
        return f"the export of case {self._case()}"

    def _needed_nbytes(self) -> int | None:
        """The prediction before and after resampling, each as float64.

        nnU-Net resamples all channels at once and in float64 (`resample_data_or_seg`). Probabilities come on top.
        """
        arrays = [item for item in self.arguments if isinstance(item, (torch.Tensor, np.ndarray))]
        if not arrays:
            return None
        shape = tuple(max(arrays, key=lambda array: math.prod(array.shape)).shape)
        target = self._get(_NEXT_STAGE)
        if target is None:
            target = (self._get(_PROPERTIES) or {}).get(_EXPORT_SHAPE, shape[1:])
        voxels: int = math.prod(shape) + shape[0] * math.prod(int(edge) for edge in target)
        return voxels * _FLOAT64_NBYTES
