"""Functions that a script registers to run in half or in float32, and `disable_casts`.

They act where operations are cast at all: inside a forward under O1. Elsewhere a function does what it did.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from wrapprec.cast import cast_tree, tensors_in
from wrapprec.errors import message
from wrapprec.island import float32
from wrapprec.migrate.apex.session import session
from wrapprec.standin import forward_of

F = TypeVar("F", bound=Callable[..., Any])
Cast = Callable[[Callable[..., Any], torch.dtype, Any, Any], Any]


def _low(tree: Any) -> torch.dtype | None:
    """What autocast casts operations on these tensors to; None where it is off."""
    for tensor in tensors_in(tree):
        kind = tensor.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return None


def _where_cast(function: F, act: Cast) -> F:
    @functools.wraps(function)
    def cast(*args: Any, **kwargs: Any) -> Any:
        low = _low((args, kwargs))
        return function(*args, **kwargs) if low is None else act(function, low, args, kwargs)

    return cast  # type: ignore[return-value]  # same signature


def _in_half(function: Callable[..., Any], low: torch.dtype, args: Any, kwargs: Any) -> Any:
    return function(*cast_tree(args, low), **cast_tree(kwargs, low))


def _in_float(function: Callable[..., Any], low: torch.dtype, args: Any, kwargs: Any) -> Any:
    return float32()(function)(*args, **kwargs)


def _in_widest(function: Callable[..., Any], low: torch.dtype, args: Any, kwargs: Any) -> Any:
    found = [t.dtype for t in tensors_in((args, kwargs)) if t.is_floating_point()]
    widest = functools.reduce(torch.promote_types, found, low)
    return function(*cast_tree(args, widest), **cast_tree(kwargs, widest))


def half_function(fn: F) -> F:
    """Make a function take its floating tensors in float16 (in what the policy computes in) inside an O1 forward.

    Args:
        fn: any function of tensors.

    Returns:
        The function to use in its place.
    """
    return _where_cast(fn, _in_half)


def float_function(fn: F) -> F:
    """Make a function run in float32 inside an O1 forward, products included, which Apex would still cast.

    Args:
        fn: any function of tensors.

    Returns:
        The function to use in its place.
    """
    return _where_cast(fn, _in_float)


def promote_function(fn: F) -> F:
    """Make a function take its floating tensors in the widest of their dtypes inside an O1 forward.

    Args:
        fn: any function of tensors.

    Returns:
        The function to use in its place.
    """
    return _where_cast(fn, _in_widest)


_MARK = "_is_registered"
"""On a function that was put in place of one, so that registering it again does nothing."""


def _register(module: Any, name: str, decorator: Callable[[Any], Any]) -> None:
    if not hasattr(module, name):
        remedy = "write the name under which the module's own code looks the function up"
        raise ValueError(message(f"the name of a function in {module!r}", repr(name), remedy=remedy))
    function = getattr(module, name)
    if not hasattr(function, _MARK):
        cast = decorator(function)
        setattr(cast, _MARK, True)
        setattr(module, name, cast)


def register_half_function(module: Any, name: str) -> None:
    """Put `half_function` around a function in its module, for good; before or after `initialize`.

    Args:
        module: a module or a class.
        name: of the function.

    Raises:
        ValueError: there is none of that name.
    """
    _register(module, name, half_function)


def register_float_function(module: Any, name: str) -> None:
    """Put `float_function` around a function in its module, for good; before or after `initialize`.

    Args:
        module: a module or a class.
        name: of the function.

    Raises:
        ValueError: there is none of that name.
    """
    _register(module, name, float_function)


def register_promote_function(module: Any, name: str) -> None:
    """Put `promote_function` around a function in its module, for good; before or after `initialize`.

    Args:
        module: a module or a class.
        name: of the function.

    Raises:
        ValueError: there is none of that name.
    """
    _register(module, name, promote_function)


@contextlib.contextmanager
def disable_casts() -> Iterator[None]:
    """Compute in float32 where O1 would cast operations: around a model's call, or inside a forward.

    O2 and O3 are not touched, as in Apex. It holds on all threads for the models of `initialize`.
    """
    paused = []
    for call in session.live():
        for model in call.models():
            for forward in forward_of(model).tree():
                region = forward.region
                if region is not None and region.autocasts:
                    region.autocasts = False
                    paused.append(region)
    try:
        island: contextlib.AbstractContextManager[Any] = float32() if paused else contextlib.nullcontext()
        with island:
            yield
    finally:
        for region in paused:
            region.autocasts = True
