"""The border of one opened scope: which scale it was opened under, and which backwards have crossed it."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable

from wrapprec import levels
from wrapprec.errors import ScaleLeakError, message
from wrapprec.scale import Scaler

if TYPE_CHECKING:
    from wrapprec.recompute import Extent

_MOST_BACKWARDS = 4096
"""How many backwards that raised on threads of the engine are remembered. Task ids are not used twice."""

running: dict[int, weakref.WeakSet[Scaler]] = {}
"""The scales that take part in the running backwards, by graph task."""

_threads: dict[int, int] = {}
"""The threads on which they first came inside."""


def _remember(by_task: dict[int, Any], task: int, make: Callable[[], Any]) -> Any:
    """The entry of a running backward, made at its first crossing and dropped when it ends."""
    if task not in by_task:
        while len(by_task) >= _MOST_BACKWARDS:
            _ended(by_task, next(iter(by_task)))
        by_task[task] = make()
        _threads[task] = get_ident()
        if task != -1:
            Variable._execution_engine.queue_callback(functools.partial(_ended, by_task, task))
    return by_task[task]


def _ended(by_task: dict[int, Any], task: int) -> None:
    by_task.pop(task, None)
    _threads.pop(task, None)


def forget_raised() -> None:
    """Forget the backwards of this thread, which is in none now: those that raised never said that they ended."""
    here = get_ident()
    for task, began_on in list(_threads.items()):
        if began_on == here:
            for scaler in running.get(task, ()):
                scaler.borders.pop(task, None)
            _ended(running, task)


class Border:
    """The border of one opened scope, with the scale it was opened under.

    Args:
        scaler: the wrapped model's loss scale; its value now is this border's S.
        outer: the border of the scope in which this one was opened: its S divides the lent weights' gradients too.
        extent: when the scope was open.
        functional: a transform of torch.func or forward-mode AD is running.
    """

    def __init__(
        self, scaler: Scaler, outer: Border | None = None, extent: Extent | None = None, functional: bool = False
    ) -> None:
        self.scaler = scaler
        self.outer = outer
        self.extent = extent
        # The backward through it is audited.
        self.audited = False
        # Called when a backward that came inside here begins.
        self.at_begin: Callable[[], None] | None = None
        self.scale = scaler.cautious() if functional else scaler.scale
        self.total: Tensor = self.scale
        if outer is not None:
            with levels.plain():
                self.total = self.scale * outer.total.to(self.scale.device)

    @functools.cached_property
    def inverse(self) -> Tensor:
        """What the gradients of lent weights are multiplied by."""
        with levels.plain():
            return self.total.reciprocal()

    def again(self, extent: Extent) -> Border:
        """The same border, for the scope of a recomputation."""
        border = copy.copy(self)
        border.extent = extent
        return border

    def enter_backward(self) -> None:
        """Remember that the running backward has come inside through this border."""
        task = torch._C._current_graph_task_id()
        if self.at_begin is not None and task != self.scaler.task:
            self.at_begin()
        with levels.plain():
            self.scaler.begin(task, _remember(running, task, weakref.WeakSet))
        _remember(self.scaler.borders, task, dict)[id(self)] = self

    def leave_backward(self, what: str) -> None:
        """Raise unless the running backward came inside through a border: else 1/S would be applied to a true gradient.

        Raises:
            ScaleLeakError: the gradient got inside past every border.
        """
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self.scaler.borders:
            raise ScaleLeakError(
                message(
                    "a gradient that entered the wrapped model through its outputs",
                    f"a gradient that reached {what} without crossing the model's loss-scale border",
                    remedy="call backward outside forward, and pass tensors that leave forward by another way than its"
                    " outputs (hooks, closures, globals) through wrapprec.leave(tensor)",
                )
            )

    def same_factor(self, other: Border | None) -> bool:
        """Gradients inside both are multiplied by the same number."""
        if other is None or other.scale is not self.scale:
            return False
        if self.outer is None or other.outer is None:
            return self.outer is other.outer
        return self.outer.same_factor(other.outer)
