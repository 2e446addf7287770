"""Meets accelerate: the Accelerator that prepares a wrapped model's optimizer saves the handle, and casts nothing."""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any

from torch.optim import Optimizer

from wrapprec.errors import WrapprecError, message
from wrapprec.patch import beneath
from wrapprec.ranks import alive
from wrapprec.undo import UndoStack


def check_precision(received: Any) -> None:
    """Refuse that accelerate casts too: a loss would be scaled twice, and the plan would not say what happens.

    Args:
        received: an Accelerator, or the state that all of them share.

    Raises:
        WrapprecError: its mixed precision is on.
    """
    precision = getattr(received, "_mixed_precision", None) or getattr(received, "mixed_precision", "no")
    if str(precision) != "no":
        raise WrapprecError(
            message(
                "an Accelerator that leaves precision to wrapprec",
                f"Accelerator(mixed_precision={str(precision)!r})",
                remedy='build Accelerator(mixed_precision="no"); wrap(..., "auto") follows what the launcher was told',
            )
        )


def check_accelerators() -> None:
    """Refuse the mixed precision of an Accelerator that was built before `wrap`; accelerate is not imported for it.

    Raises:
        WrapprecError: it is on.
    """
    if _is_in_use():
        check_precision(sys.modules["accelerate.state"].AcceleratorState())


def _is_in_use() -> bool:
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    return state is not None and bool(state._shared_state)


def _kind() -> Any:
    return getattr(sys.modules.get("accelerate"), "Accelerator", None)


def _register(accelerator: Any, handle: Any, undo: UndoStack) -> None:
    if all(registered is not handle for registered in accelerator._custom_objects):
        accelerator.register_for_checkpointing(handle)
        # Not kept alive: its own `_custom_objects` keep the handle.
        undo.push(functools.partial(_forget, weakref.ref(accelerator), weakref.ref(handle)))


def _forget(accelerator: weakref.ref[Any], handle: weakref.ref[Any]) -> None:
    found, known = accelerator(), handle()
    if found is not None:
        # The same list, which somebody may hold.
        found._custom_objects[:] = [one for one in found._custom_objects if one is not known]


def follow(optimizer: Optimizer, handle: Any, undo: UndoStack) -> None:
    """Have `handle` saved and loaded by whichever Accelerator prepares `optimizer`, or has prepared it.

    Preparing loads the optimizer's own state into it: that is when the Accelerator can be seen, among the callers. With
    ``device_placement=False`` it does not; then it is seen when it saves or loads the optimizer, before the handle.
    """
    for accelerator in alive(_kind()) if _is_in_use() and _kind() is not None else ():
        if any(beneath(prepared) is optimizer for prepared in accelerator._optimizers):
            _register(accelerator, handle, undo)
    # The optimizer keeps neither of them alive.
    meet = functools.partial(_meet, weakref.ref(handle), weakref.ref(undo))
    undo.push(optimizer.register_load_state_dict_post_hook(functools.partial(meet, True)).remove)
    # What was trained is saved whatever the Accelerator is.
    undo.push(optimizer.register_state_dict_pre_hook(functools.partial(meet, False)).remove)


def _meet(handle: weakref.ref[Any], undo: weakref.ref[UndoStack], refuses: bool, optimizer: Optimizer) -> None:
    kind, known, changes, frame = _kind(), handle(), undo(), sys._getframe(1)
    if kind is None or known is None or changes is None:
        return
    while frame is not None:
        # Reading the locals of a frame keeps what they are now alive as long as the frame: accelerate's own are short.
        own = str(frame.f_globals.get("__name__")).startswith("accelerate.")
        accelerator = frame.f_locals.get("self") if own else None
        if isinstance(accelerator, kind):
            if refuses:
                check_precision(accelerator)
            _register(accelerator, known, changes)
            return
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
