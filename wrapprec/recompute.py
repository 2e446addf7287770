"""Tells, inside a backward, whether a call of a wrapped module recomputes a checkpointed block, and of which scope.

A checkpoint runs its function again in backward. Where the function was called inside a scope, the recomputation
belongs to that inside: nothing may be cast or scaled on its way out. Where it contains the scope
(``checkpoint(model, x)``), the border is needed. Autograd numbers its nodes in the order in which forward makes them,
so the node for which we recompute says where it was made.
"""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch._C._autograd import _get_sequence_nr
from torch.utils.checkpoint import _CheckpointFrame

if TYPE_CHECKING:
    from wrapprec.forward import Forward
    from wrapprec.scope import Scope
    from wrapprec.state import Shared

_REMEMBERED = 512


class Extent:
    """The numbers of the autograd nodes that were made while a scope was open.

    Attributes:
        first: the number of the first one.
        last: the number after the last one; None while the scope is open.
    """

    def __init__(self) -> None:
        self.first: int = _get_sequence_nr()
        self.last: int | None = None

    def end(self) -> None:
        """The scope has closed."""
        self.last = _get_sequence_nr()

    def covers(self, node: Any) -> bool:
        """The node was made while the scope was open."""
        number: int = node._sequence_nr()
        return self.first <= number and (self.last is None or number < self.last)


_unscaled: weakref.WeakKeyDictionary[Shared, deque[Extent]] = weakref.WeakKeyDictionary()
"""The latest scopes with a reentrant checkpoint, without a loss scale; with one, the running backward knows them."""


def remember(shared: Shared, extent: Extent) -> None:
    """Note a scope without a border, part of which ran under no_grad as a reentrant checkpoint does."""
    _unscaled.setdefault(shared, deque(maxlen=_REMEMBERED)).append(extent)


_around: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Shared]] = weakref.WeakKeyDictionary()
"""The models that opened a scope within a non-reentrant checkpoint, by the checkpoint's frame."""


def remember_frame(shared: Shared) -> None:
    """Note a scope that opens inside a non-reentrant checkpoint's function: it will be recomputed as a whole."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None:
        frame = _frame_in(hooks[0])
        if frame is not None:
            _around.setdefault(frame, weakref.WeakSet()).add(shared)


def recomputed(forward: Forward, around: Scope | None) -> Extent | None:
    """The scope of which a call, made inside a backward, is a recomputed part.

    Args:
        forward: what was called from outside every scope of its model.
        around: the scope of another model that is open around the call.

    Returns:
        The extent of the scope, or None where the call is a scope of its own.
    """
    node = torch._C._current_autograd_node()
    task = torch._C._current_graph_task_id()
    if node is None or task == -1 or (around is not None and around.recomputes):
        return None
    shared = forward.shared
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    again = hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")
    if again:
        frame = _frame_in(hooks[0])
        if frame is not None and shared in _around.get(frame, ()):
            return None
        if frame is not None and shared.scaler is None:
            return Extent()
    elif around is not None:
        return None
    extents: Iterable[Extent]
    if shared.scaler is not None:
        extents = [border.extent for border in list(shared.scaler.borders.get(task, {}).values())]
    else:
        extents = tuple(_unscaled.get(shared, ()))
    # The innermost scope that covers the node was opened last.
    found = [extent for extent in extents if extent.covers(node)]
    return max(found, key=lambda extent: extent.first) if found else None


def _frame_in(function: Any, depth: int = 2) -> Any:
    """The checkpoint frame that a saved-tensor hook of `torch.utils.checkpoint` holds in its closure."""
    for cell in getattr(function, "__closure__", None) or ():
        content = cell.cell_contents
        held = content() if isinstance(content, weakref.ref) else content
        if isinstance(held, _CheckpointFrame):
            return held
        if depth and isinstance(held, types.FunctionType):
            found = _frame_in(held, depth - 1)
            if found is not None:
                return found
    return None
