"""What torch.compile has been put around in a network or a loss, and the way back to the originals.

torch.compile leaves four kinds of things: an `OptimizedModule` around a module (nnU-Net's network; under DDP inside of
`.module`; `loss.dc` of its losses), a function that knows its original, and a module that is compiled in place
(`module.compile()`). They are taken out where they are held, so everything else stays the object that it was: the
optimizer's parameters, DDP's buckets, the loss's weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

Forward = Callable[..., Any]

_ORIGINAL: Final = "_torchdynamo_orig_callable"
_NEVER_COMPILED: Final = "_torchdynamo_disable"
_IN_PLACE: Final = "_compiled_call_impl"


def is_compiled(thing: Any) -> bool:
    """Whether torch.compile has been put around `thing` or around anything below it."""
    return next(_places({"": thing}, ""), None) is not None


def eager(thing: Any) -> Any:
    """The original of `thing`, in which everything below is the original too (changed in place)."""
    box = {"": thing}
    for holder, name, original in list(_places(box, "")):
        holder[name] = original
    return box[""]


def optimized_modules(thing: Any) -> list[Any]:
    """Each `OptimizedModule` that is `thing` or is below it."""
    from torch._dynamo import OptimizedModule

    modules = thing.modules() if isinstance(thing, nn.Module) else ()
    return [module for module in modules if isinstance(module, OptimizedModule)]


@contextmanager
def answered(module: Any, answer: Callable[[Forward], Forward]) -> Iterator[None]:
    """Inside the `with` block, calls of an `OptimizedModule` are answered by `answer(its compiled forward)`.

    The module stays the object that it is: nnU-Net asks for its type in many places.
    """
    attributes = vars(module)  # not setattr: older versions of torch would set it on the original
    compiled = attributes["forward"]
    attributes["forward"] = answer(compiled)
    try:
        yield
    finally:
        attributes["forward"] = compiled


def _places(holder: MutableMapping[str, Any], name: str) -> Iterator[tuple[MutableMapping[str, Any], str, Any]]:
    """Where something compiled is held, and what belongs there instead; for `holder[name]` and all below it."""
    original = _original(holder[name])
    if original is not holder[name]:
        yield holder, name, original
    attributes = getattr(original, "__dict__", {})
    if isinstance(original, nn.Module):
        if attributes.get(_IN_PLACE) is not None:
            yield attributes, _IN_PLACE, None
        for child in original._modules:
            yield from _places(original._modules, child)
    elif inspect.isroutine(original):
        return
    for attribute, value in attributes.items():
        if attribute != _IN_PLACE and (isinstance(value, nn.Module) or _original(value) is not value):
            yield from _places(attributes, attribute)


def _original(thing: Any) -> Any:
    from torch._dynamo import OptimizedModule

    while True:
        if isinstance(thing, OptimizedModule):
            thing = thing._orig_mod
        elif inspect.isfunction(thing) and hasattr(thing, _ORIGINAL) and not hasattr(thing, _NEVER_COMPILED):
            thing = getattr(thing, _ORIGINAL)
        else:
            return thing
