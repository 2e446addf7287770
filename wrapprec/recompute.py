"""Tells, inside a backward, whether a call of a wrapped module recomputes a checkpointed block, and of which scope.

A checkpoint runs its function again in backward. Where the function was called inside a scope, the recomputation
belongs to that inside: nothing may be cast or scaled on its way out. Where it contains the scope
(``checkpoint(model, x)``), the border is needed. Autograd numbers its nodes in the order in which forward makes them,
so the node for which we recompute says where it was made.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch._C._autograd import _get_sequence_nr

if TYPE_CHECKING:
    from wrapprec.region import Forward
    from wrapprec.state import Shared

_REMEMBERED = 512


class Extent:
    """The numbers of the autograd nodes that were made while a scope was open.

    Args:
        opener: the Forward that opened the scope.
    """

    def __init__(self, opener: Forward) -> None:
        self.opener = weakref.ref(opener)
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
"""The latest scopes of models without a loss scale; where there is one, the running backward knows its scopes."""


def remember(shared: Shared, extent: Extent) -> None:
    """Note a scope that was opened without a border."""
    _unscaled.setdefault(shared, deque(maxlen=_REMEMBERED)).append(extent)


def recomputed(forward: Forward, within: bool) -> Extent | None:
    """The scope of which a call, made inside a backward, is a recomputed part.

    Args:
        forward: what was called from outside every scope of its model.
        within: a scope of another model is open around the call.

    Returns:
        The extent of the scope, or None where the call is a scope of its own.
    """
    node = torch._C._current_autograd_node()
    task = torch._C._current_graph_task_id()
    if node is None or task == -1:
        return None
    again = _is_recomputation_hook()
    if within and not again:
        return None
    scaler = forward.shared.scaler
    extents: Iterable[Extent]
    if scaler is not None:
        extents = [border.extent for border in list(scaler.borders.get(task, {}).values())]
    else:
        extents = tuple(_unscaled.get(forward.shared, ()))
    # The innermost scope that covers the node was opened last.
    found = [extent for extent in extents if extent.covers(node)]
    if not found:
        return None
    extent = max(found, key=lambda extent: extent.first)
    # A non-reentrant checkpoint recomputes whatever its function ran, the scope itself too, for any node below it.
    if again and (within or extent.opener() is forward):
        return None
    return extent


def _is_recomputation_hook() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")
