"""What runs around a call: the transforms of torch.func, and forward-mode AD.

Under a transform a tensor is a stack of wrappers, one for each level that concerns it, and each level has its own
graph. What the outermost wrapper says (``requires_grad``, ``grad_fn``) is the innermost transform's truth alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack, temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

_BATCHED, _BATCHES = (torch._C._dispatch_key_parse(name) for name in ("Batched", "VmapMode"))

_Out = TypeVar("_Out", Tensor, tuple[Tensor, ...])

_NOTHING = contextlib.nullcontext()


def depth() -> int:
    """How many transforms of torch.func (grad, vmap, ...) are running."""
    innermost = torch._C._functorch.peek_interpreter_stack()
    return 0 if innermost is None else innermost.level()


def differentiates_forward() -> bool:
    """Forward-mode AD is on: `torch.autograd.forward_ad`, or a `jvp` of torch.func."""
    return forward_ad._current_level >= 0


def any_running() -> bool:
    """A transform or forward-mode AD is on; they have no rules for operations on mixed dtypes."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def without(above: int) -> contextlib.AbstractContextManager[Any]:
    """Leave the transforms above a depth for a while."""
    if depth() <= above:
        return _NOTHING
    modes = contextlib.ExitStack()
    while depth() > above:
        modes.enter_context(temporarily_pop_interpreter_stack())
    return modes


def plain() -> contextlib.AbstractContextManager[Any]:
    """Leave all transforms for a while: what is made or changed here is no wrapper that dies with its level."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return _NOTHING
    cleared: contextlib.AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return cleared


def layers(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor and what its wrappers wrap, from the innermost transform out."""
    functorch = torch._C._functorch
    yield tensor
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
        yield tensor


def requires_grad(tensor: Tensor) -> bool:
    """Some level differentiates with respect to what the tensor was made from."""
    return any(layer.requires_grad for layer in layers(tensor))


def batches_gradients() -> bool:
    """``is_grads_batched=True`` or ``vectorize=True``: a backward of many gradients at once, by the older vmap."""
    included: bool = torch._C._dispatch_tls_is_dispatch_key_included(_BATCHES)
    return included


def physically(fn: Callable[..., _Out], *tensors: Tensor) -> _Out:
    """Apply an elementwise function to whole batches, where ``is_grads_batched=True`` or ``vectorize=True`` made some.

    Those go by an older vmap than torch.func's, which knows nothing of Functions and has few rules.

    Args:
        fn: gives a tensor, or a tuple of one for each argument; elementwise.
        tensors: its arguments.

    Returns:
        What `fn` gives, batched like the arguments.
    """
    if not batches_gradients():
        return fn(*tensors)
    batched = [torch._C._dispatch_keys(tensor).has(_BATCHED) for tensor in tensors]
    if not any(batched):
        return fn(*tensors)
    # The level is counted by thread, and a device's thread of autograd has not counted it.
    level = max(torch._C._vmapmode_increment_nesting() - 1, 1)
    torch._C._vmapmode_decrement_nesting()
    whole = [torch._remove_batch_dim(t, level, 0, 0) if b else t for t, b in zip(tensors, batched, strict=True)]
    out = fn(*whole)
    if isinstance(out, Tensor):
        return torch._add_batch_dim(out, 0, level)
    return tuple(torch._add_batch_dim(t, 0, level) if b else t for t, b in zip(out, batched, strict=True))
