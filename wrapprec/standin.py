"""Finds what stands in for a module's forward: as its `forward`, or beneath one that accelerate put there since."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from wrapprec.backends.recording import beneath_graph


class StandIn:
    """What `wrap` puts on a module; `forward.Forward` is the only one."""

    replaced: Any
    original: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__getstate__().items():  # type: ignore[attr-defined]  # from Python 3.11 on, of all
            setattr(new, key, copy.deepcopy(value, memo))
        return new


def place_of(module: nn.Module) -> str:
    """Under which name a module's stand-in belongs, or is.

    accelerate's hooks keep the forward that they found as `_old_forward`, call it between bringing the weights and
    taking them away, and put it back when they go.
    """
    own = module.__dict__
    return "_old_forward" if "_hf_hook" in own and "_old_forward" in own else "forward"


def forward_of(module: nn.Module) -> Any:
    """The stand-in on a module, or else the forward that its instance has there, or None."""
    return module.__dict__.get(place_of(module))


def stands_in(module: nn.Module) -> bool:
    """Whether a module has a stand-in, be it under a graph that was recorded of it since."""
    own = forward_of(module)
    return isinstance(own, StandIn) or beneath_graph(own, StandIn) is not None


def take_away(module: nn.Module) -> None:
    """Put the original back where a stand-in was moved since it was put there."""
    name = place_of(module)
    own = module.__dict__.get(name)
    # A graph that was recorded of it since stays in its precision: it goes, too.
    own = beneath_graph(own, StandIn) or own
    if isinstance(own, StandIn):
        if name == "forward" and own.replaced is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own.original
