"""Puts a function in place of an optimizer's method, without keeping alive an optimizer that is rebuilt later."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from wrapprec.undo import ABSENT, UndoStack


def function_of(method: Any) -> Any:
    """The function of a bound method, or what it is given."""
    return getattr(method, "__func__", method)


def patch(optimizer: Optimizer, name: str, function: Callable[..., Any], undo: UndoStack) -> None:
    """Set a method on the instance.

    It must be a function bound as a method: ``LRScheduler.__init__`` reads ``step.__func__`` and binds it again.

    Args:
        optimizer: it is not kept alive, neither here nor by `undo`.
        name: of the method.
        function: takes the optimizer first.
        undo: puts the method back, unless somebody has replaced ours since.
    """
    ref, before = weakref.ref(optimizer), optimizer.__dict__.get(name, ABSENT)
    # A bound method would keep the optimizer alive: it is bound again when it is put back.
    bound = getattr(before, "__self__", None) is optimizer
    before = function_of(before) if bound else before
    optimizer.__dict__[name] = types.MethodType(function, optimizer)

    def put_back() -> None:
        alive = ref()
        if alive is None or function_of(alive.__dict__.get(name)) is not function:
            return
        if before is ABSENT:
            del alive.__dict__[name]
        else:
            alive.__dict__[name] = types.MethodType(before, alive) if bound else before

    undo.push(put_back)


def beneath(optimizer: Any) -> Any:
    """The optimizer that does the work of one that is a shell around it; any other itself.

    A shell (of an Accelerator, torch's PostLocalSGDOptimizer) is an Optimizer to `isinstance` only: it was never
    initialised as one, and has no hooks.
    """
    while not hasattr(optimizer, "_optimizer_load_state_dict_post_hooks"):
        inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
        if len(inner) != 1:
            break
        optimizer = inner[0]
    return optimizer
