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
    """Have an optimizer keep small updates of low precision weights; a second call for one does nothing more.

    It goes around what keeps the state in few bits, and below the guard that skips steps.

    What an optimizer has another one step for it (SAM, Lookahead) is left to the other one.

    Args:
        optimizer: any.
        models: of the handle.
        rounders: those that it has; a new one is added.
        undo: takes the way back.
    """
    stored = [model for model in models if model.converted is not None]
    if not stored or any(rounder.guards(optimizer) for rounder in rounders):
        return
    inner = inner_optimizers(optimizer)
    for one in inner:
        keep_updates(one, models, rounders, undo)
    theirs = {id(param) for one in inner for group in one.param_groups for param in group["params"]}
    if inner and all(id(param) in theirs for group in optimizer.param_groups for param in group["params"]):
        return
    rounded = [model for model in stored if model.converted.mode is not None]
    if rounded:
        rounder = Rounder(optimizer, rounded, theirs)
        rounder.install(undo)
        rounders.append(rounder)


def follow_dtypes(optimizer: Optimizer, models: list[Shared], undo: UndoStack) -> None:
    """Give the state that there is the dtype the optimizer will work in, and back when all else is undone.

    Args:
        optimizer: any; those that it keeps are meant too.
        models: of the handle.
        undo: takes the way back.
    """
    stored = [model for model in models if model.converted is not None]
    refs = [weakref.ref(one) for one in (optimizer, *inner_optimizers(optimizer))] if stored else []

    def follow(back: bool) -> None:
        for ref in refs:
            alive = ref()
            if alive is not None:
                _follow(alive, stored, back)

    follow(back=False)
    if stored:
        undo.push(lambda: follow(back=True))


def _follow(optimizer: Optimizer, models: list[Shared], back: bool) -> None:
    for model in models:
        for name, param in model.named_parameters():
            if param in optimizer.state:
                before, now = model.converted.dtypes.get(name, (param.dtype, param.dtype))
                wide = torch.float32 if now in LOW and model.converted.mode is not None else now
                cast_state(optimizer.state[param], before if back else wide)
