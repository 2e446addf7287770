"""Puts the border on tensors that leave a scope: for the scope itself, and as `wrapprec.leave` for users."""

from __future__ import annotations

import torch
from torch import Tensor

from wrapprec import audit, levels
from wrapprec.border import Border
from wrapprec.boundary import Leave
from wrapprec.current import thread
from wrapprec.errors import ScaleLeakError, message


def cross_out(tensor: Tensor, border: Border, start: int, strict: bool = False) -> Tensor:
    """Put the border on a tensor that was made inside, unless `leave` has done so.

    Args:
        tensor: requires grad.
        border: the scope's.
        start: the number of the scope's first node.
        strict: other threads use the model too, and number their nodes as they like: the graph itself must tell.
    """
    nodes = [layer.grad_fn for layer in levels.layers(tensor)]
    # A leaf or an older graph did not pass through this scope... unless it is given out by forward itself.
    young = [node for node in nodes if node is not None and node._sequence_nr() >= start]
    if not (young or levels.differentiates_forward()):
        return tensor
    # Also a view of one that has left: `logits.t()` beside `logits`.
    above = young if tensor._base is None else [*young, tensor._base.grad_fn]
    if any(audit.crossing(node) is Leave and getattr(node, "border", None) is border for node in above):
        return tensor
    if strict and not any(below is border for below in borders_below(tensor)[0]):
        return tensor
    # In float16 the true gradient would underflow before it is scaled.
    wide = tensor.float() if tensor.dtype is torch.float16 else tensor
    left: Tensor = Leave.apply(wide, border)
    if wide is not tensor and left.grad_fn is not None:
        left.grad_fn.narrow = tensor.dtype  # type: ignore[attr-defined]  # it may come in again: `carried`
    return left


def leave(tensor: Tensor) -> Tensor:
    """Put the scale border on a tensor that leaves forward by another way than its outputs.

    Call it on an activation that a hook collects, or that a closure or a global keeps, before it is used in a loss:
    inside forward (in the hook) or afterwards.

    Args:
        tensor: any floating tensor of any shape.

    Returns:
        The same values, with true gradients; the tensor itself where no loss scale is on.

    Raises:
        ScaleLeakError: the tensor belongs to several scales at once.

    >>> import torch
    >>> leave(torch.ones(2))
    tensor([1., 1.])
    """
    if not levels.requires_grad(tensor):
        return tensor
    scope = thread.scope
    if scope is None:
        return _leave_behind(tensor)
    while scope is not None:
        if scope.border is not None and not scope.recomputes:
            tensor = cross_out(tensor, scope.border, scope.extent.first)
        scope = scope.outer
    return tensor


def _leave_behind(tensor: Tensor) -> Tensor:
    """`leave` after forward: the graph tells the border."""
    borders, crossed = borders_below(tensor)
    factors = [border for i, border in enumerate(borders) if not any(border.same_factor(b) for b in borders[:i])]
    if len(factors) > 1 or (factors and crossed):
        raise ScaleLeakError(
            message(
                "a tensor from inside one forward of one wrapped model",
                f"a tensor of shape {tuple(tensor.shape)} that depends on several, or on outputs too",
                remedy="call wrapprec.leave on each activation where it is collected, inside forward",
            )
        )
    border = factors[0] if factors else None
    while border is not None:
        tensor = Leave.apply(tensor.float() if tensor.dtype is torch.float16 else tensor, border)
        border = border.outer
    return tensor


def borders_below(tensor: Tensor) -> tuple[list[Border], bool]:
    """The innermost borders that a tensor is inside of, found where its graph crosses them.

    Returns:
        The borders, and whether a part of the graph is outside all of them.
    """
    found: dict[int, Border] = {}
    outside = False
    todo, seen = audit.roots_of(tensor), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = audit.crossing(node)
        if kind is None:
            todo += [below for below, _ in node.next_functions if below is not None]
            continue
        border: Border = node.border
        around = border.outer if kind in audit.GOES_IN else border
        if around is None:
            outside = True
        else:
            found[id(around)] = around
    return list(found.values()), outside
