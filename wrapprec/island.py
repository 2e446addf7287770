"""An FP32 island inside somebody's forward: a context manager and decorator for code, where a Rule is for modules."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from wrapprec.cast import cast_tree, tensors_in
from wrapprec.current import thread
from wrapprec.dtypes import LOW

F = TypeVar("F", bound=Callable[..., Any])

_BY_IDENTITY = frozenset(
    """
    register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ backward data_ptr numpy item
    tolist untyped_storage storage _typed_storage share_memory_ type to dim size stride numel element_size
    is_floating_point is_complex is_contiguous get_device record_stream is_inference is_shared is_pinned
    __len__ __bool__ __float__ __int__ __index__ __repr__ __format__ __hash__ __contains__ __deepcopy__
    __reduce_ex__ half bfloat16 float double bool int long _is_view is_leaf detach clone copy_ grad is_tensor
    """.split()  # noqa: SIM905  # a word list reads better
)
"""Functions that look at, or attach something to, this very tensor, or convert it themselves."""


class _Upcast(TorchFunctionMode):
    """Gives every operation its half precision operands in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _BY_IDENTITY or name in ("__get__", "__set__", "__delete__"):
            return func(*args, **kwargs)
        if _writes(name) and any(t.dtype in LOW for t in tensors_in(args[:1])):
            return func(*args, **kwargs)
        out = kwargs.get("out")
        if out is not None and any(t.dtype in LOW for t in tensors_in(out)):
            rest = {key: value for key, value in kwargs.items() if key != "out"}
            return fill(out, func(*_up(args), **_up(rest)))
        return func(*_up(args), **_up(kwargs))


def _writes(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__",) or name.startswith("__i")


def fill(out: Any, result: Any) -> Any:
    """Write results into the tensors that were given for them."""
    for target, value in zip(tensors_in(out), tensors_in(result), strict=True):
        target.resize_(value.shape).copy_(value)
    return out


def _device_types() -> set[str]:
    """The device types for which autocast may be on: torch's own, and those of the models that are being called."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    scope = thread.scope
    while scope is not None:
        kinds.add(scope.shared.device.type)
        scope = scope.outer
    return kinds


def _up(tree: Any) -> Any:
    return cast_tree(tree, torch.float32)


def is_island_open() -> bool:
    """Whether code that runs here and now is inside `float32`."""
    return any(isinstance(mode, _Upcast) for mode in _get_current_function_mode_stack())


class float32(contextlib.AbstractContextManager["float32"]):
    """Compute in float32 whatever the surroundings: ``with wrapprec.float32():`` or ``@wrapprec.float32()``.

    Inside, autocast is off and every operation gets its float16 and bfloat16 operands in float32, so scatter,
    index_add and hand-written reductions work and accumulate in full precision. Operations in place on a low
    precision tensor stay as they are. A decorated function gets its tensor arguments in float32 too. Weights that
    were lent in low precision (module casting) are raised from there.

    >>> a = torch.ones(2, dtype=torch.bfloat16)
    >>> with float32():
    ...     total = torch.zeros(2).index_add_(0, torch.tensor([0, 0]), a)
    >>> total
    tensor([2., 0.])
    """

    def __init__(self) -> None:
        self._open = threading.local()

    def __enter__(self) -> float32:
        stack = contextlib.ExitStack()
        for kind in _device_types():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_Upcast())
        stacks = self._open.__dict__.setdefault("stacks", [])
        stacks.append(stack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.stacks.pop().__exit__(kind, error, trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return float32, ()

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def island(*args: Any, **kwargs: Any) -> Any:
            with float32():
                return function(*_up(args), **_up(kwargs))

        return island  # type: ignore[return-value]  # same signature
