"""Meets an optimizer of converted parameters: its state follows their dtypes, and its step keeps small updates."""

from __future__ import annotations

import weakref

import torch
from torch.optim import Optimizer

from wrapprec.dtypes import LOW
from wrapprec.lowbit.rounding import Rounder
from wrapprec.lowbit.states import cast_state
from wrapprec.state import Shared
from wrapprec.step import inner_optimizers
from wrapprec.undo import UndoStack


def keep_updates(optimizer: Optimizer, models: list[Shared], rounders: list[Rounder], undo: UndoStack) -> None:
    """Make an optimizer fit for converted parameters; a second call for one does nothing more.

    What an optimizer has another one step for it (SAM, Lookahead) is left to the other one.

    Args:
        optimizer: any.
        models: of the handle.
        rounders: those that it has; a new one is added.
        undo: takes the way back.
    """
    stored = [model for model in models if model.kept is not None]
    if not stored or any(rounder.guards(optimizer) for rounder in rounders):
        return
    inner = inner_optimizers(optimizer)
    for one in inner:
        keep_updates(one, models, rounders, undo)
    theirs = {id(param) for one in inner for group in one.param_groups for param in group["params"]}
    if inner and all(id(param) in theirs for group in optimizer.param_groups for param in group["params"]):
        return
    _cast_states(optimizer, stored, undo)
    rounded = [model for model in stored if model.kept.mode is not None]
    if rounded:
        rounder = Rounder(optimizer, rounded, theirs)
        rounder.install(undo)
        rounders.append(rounder)


def _cast_states(optimizer: Optimizer, models: list[Shared], undo: UndoStack) -> None:
    """Give the state that there is the dtype the optimizer will work in, and back when unwrapped."""
    ref = weakref.ref(optimizer)
    _follow(optimizer, models, back=False)

    def put_back() -> None:
        alive = ref()
        if alive is not None:
            _follow(alive, models, back=True)

    undo.push(put_back)


def _follow(optimizer: Optimizer, models: list[Shared], back: bool) -> None:
    for model in models:
        for name, param in model.named_parameters():
            if param not in optimizer.state:
                continue
            before, now = model.kept.dtypes.get(name, (param.dtype, param.dtype))
            wide = torch.float32 if now in LOW and model.kept.mode is not None else now
            cast_state(optimizer.state[param], before if back else wide)
