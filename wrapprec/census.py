"""The modules of a scope, looked at all together: what changed since the last look, and whether anything is to be lent.

Every forward of a model asks, so each question is one pass in C over all modules or parameters, and not a loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wrapprec.computed import computed_by_hooks
from wrapprec.lent import originals
from wrapprec.modes import graphs_lend
from wrapprec.sharded import MARK
from wrapprec.standin import stands_in

if TYPE_CHECKING:
    from wrapprec.forward import Forward
    from wrapprec.scope import Scope


class Census:
    """The Forwards at and below one, and their modules as they are now.

    Args:
        forwards: in registration order.

    Attributes:
        every: the Forwards, to look them up in.
        simple: those that run their module's forward as it is, unless the scope has a reason.
        lends_nothing: without a loss scale, and outside of `frozen()`, none of their weights is lent.
    """

    def __init__(self, forwards: list[Forward]) -> None:
        self.forwards = forwards
        self.every = frozenset(forwards)
        self.modules = [forward.module for forward in forwards]
        self._complete = all(stands_in(module) for module in self.modules[0].modules())
        self._own = [module.__dict__ for module in self.modules]
        # A module's dict of submodules stays the same one.
        self._below = [module._modules for module in self.modules]
        self._lengths = [len(below) for below in self._below]
        self._filled = [below for below in self._below if below]
        self._children = [tuple(below.values()) for below in self._filled]
        self._managed = [forward.managed is not None for forward in forwards]
        kinds = {forward.stored_dtype for forward in forwards}
        # The one dtype that all their parameters are to have, if it is one.
        self._stored = kinds if len(kinds) == 1 and not any(self._managed) else frozenset[torch.dtype]()
        self._compiled = any(forward.compiled for forward in forwards)
        self.lends_nothing = not any(forward.lend_dtype is not None or forward.managed for forward in forwards)
        self.simple = frozenset(forward for forward in forwards if forward.is_simple())

    def is_stale(self) -> bool:
        """Whether submodules came or went."""
        if not self._complete or [len(below) for below in self._below] != self._lengths:
            return True
        return [tuple(below.values()) for below in self._filled] != self._children

    def is_sharded_otherwise(self) -> bool:
        """Whether FSDP manages other modules than before."""
        return [MARK in own for own in self._own] != self._managed

    def all_stored(self) -> bool:
        """Whether it is plain that all parameters have the dtype that they are to have."""
        owners = [own["_parameters"] for own in self._own if own["_parameters"]]
        return {param.dtype for params in owners for param in params.values() if param is not None} <= self._stored

    def device(self) -> torch.device | None:
        """Where the first parameter is that is somewhere."""
        for own in self._own:
            for param in own["_parameters"].values():
                if param is not None and not param.is_meta:
                    device: torch.device = param.device
                    return device
        return None

    def computes(self) -> bool:
        """Whether some module computes weights by hooks, or did so when it was looked at last."""
        return bool([1 for own in self._own if own["_forward_pre_hooks"]] or [1 for f in self.forwards if f.computed])

    def compiles(self) -> bool:
        """Whether some module is compiled by itself."""
        return self._compiled or bool([1 for module in self.modules if module._compiled_call_impl is not None])


def left_to_lend(scope: Scope, tree: list[Forward], frozen: bool) -> list[Forward]:
    """Note the Forwards of a tree as dealt with, and say of which the weights are to be looked at.

    Args:
        scope: that lends.
        tree: the opener's, or one Forward that was found later.
        frozen: weights that were cast once are lent.
    """
    bordered = scope.border is not None
    by_graph = not bordered or graphs_lend
    census = tree[0].census()
    if census.forwards is tree and not scope.done and not census.computes() and not (by_graph and census.compiles()):
        if scope.shared.diagnosis is None:
            scope.simple = census.simple
        if not bordered and not frozen and census.lends_nothing:
            scope.done |= census.every
            return []
        if tree[0].replica is None:
            scope.done |= census.every
            return [forward for forward in tree if originals(forward.module)]
    left: list[Forward] = []
    compiled: set[Forward] = set()
    for forward in tree:
        if forward in scope.done or forward in compiled:
            continue
        if by_graph and (forward.compiled or forward.module._compiled_call_impl is not None):
            # Its graph lends them; where it runs eagerly after all, they are lent when it is called.
            compiled.update(forward.tree())
            if len(tree) > 1:
                continue
        scope.done.add(forward)
        forward.computed = computed_by_hooks(forward.module) if forward.module._forward_pre_hooks else {}
        left.append(forward)
    return left
