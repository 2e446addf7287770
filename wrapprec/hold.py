"""Holds a learning-rate scheduler while every step since it last advanced was skipped."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from wrapprec.errors import message
from wrapprec.patch import beneath
from wrapprec.undo import UndoStack


class Hold:
    """What a scheduler has to wait for: one good step.

    Args:
        read: reads a one-element tensor on the host.
    """

    def __init__(self, read: Callable[[Tensor], float]) -> None:
        self._read = read
        self.active = True
        self._stepped = False
        self._good = False
        self._due = True
        # Good steps of which only the device knows.
        self._good_on_device: Tensor | None = None

    def note(self, skipped: Tensor | bool) -> None:
        """A step was taken or skipped; a tensor is 1.0 for skipped, float32, shape ()."""
        self._stepped = True
        if isinstance(skipped, Tensor):
            good = 1.0 - skipped
            self._good_on_device = good if self._good_on_device is None else self._good_on_device + good
        else:
            self._good |= not skipped

    def _is_due(self, again: bool) -> bool:
        """Whether the scheduler may advance; it always may when nothing was stepped at all.

        Args:
            again: unless a step came in between, this asks the same as the last time.
        """
        if not self.active:
            return True
        if self._stepped:
            self._due = self._good or (self._good_on_device is not None and self._read(self._good_on_device) > 0)
            self._stepped = self._good = False
            self._good_on_device = None
        elif not again:
            self._due = True
        return self._due

    def install(self, scheduler: Any, undo: UndoStack) -> None:
        """Patch the scheduler's `step`, and its `state_dict`, which would otherwise list the patch as state."""
        own = {name: scheduler.__dict__.get(name) for name in ("step", "state_dict")}

        @functools.wraps(type(scheduler).step)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            # accelerate advances a scheduler once for each process.
            again = sys._getframe(1).f_globals.get("__name__") == "accelerate.scheduler"
            return original("step", scheduler, *args, **kwargs) if self._is_due(again) else None

        @functools.wraps(type(scheduler).state_dict)
        def state_dict(scheduler: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            state: dict[str, Any] = original("state_dict", scheduler, *args, **kwargs)
            return {key: value for key, value in state.items() if key not in own}

        def original(name: str, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            before = own[name] or functools.partial(getattr(type(scheduler), name), scheduler)
            return before(*args, **kwargs)

        undo.push(self._deactivate)
        undo.set_attribute(scheduler, "step", types.MethodType(step, scheduler))
        undo.set_attribute(scheduler, "state_dict", types.MethodType(state_dict, scheduler))

    def _deactivate(self) -> None:
        self.active = False


def check_scheduler(scheduler: Any, optimizers: list[Optimizer]) -> None:
    """Raise unless `scheduler` belongs to one of `optimizers`.

    Raises:
        ValueError: it does not, so that it could not be held when that optimizer's steps are skipped.
    """
    theirs = beneath(getattr(scheduler, "optimizer", None))
    if theirs is not None and all(theirs is not optimizer for optimizer in optimizers):
        raise ValueError(
            message(
                "a scheduler of an optimizer that is given with it",
                f"a {type(scheduler).__name__} of another {type(theirs).__name__}",
                remedy="give the scheduler's own optimizer too: wrap(model, optimizer, policy, scheduler=scheduler)",
            )
        )
