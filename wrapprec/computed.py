"""Weights that a forward pre-hook computes from parameters: the older weight_norm and spectral_norm, and pruning.

Such a hook leaves its result as a plain attribute of the module, before forward is entered: inside the scope where a
parent has opened it, outside where the module itself is about to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from wrapprec.lent import originals

if TYPE_CHECKING:
    from wrapprec.state import Shared

_SUFFIXES = ("_g", "_v", "_orig", "_raw", "_bar")
"""What the parameters that a weight is computed from are called, after its own name; the last two by users."""


def computed(module: nn.Module) -> dict[str, str]:
    """The weights that hooks compute, known by the name that the hook object holds.

    Args:
        module: its pre-hooks are looked at; functions compute nothing that could be known.

    Returns:
        By the name of each parameter that goes into a computed weight, the name of that weight.
    """
    found: dict[str, str] = {}
    params = originals(module)
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if isinstance(name, str) and isinstance(module.__dict__.get(name), Tensor):
            found |= {name + suffix: name for suffix in _SUFFIXES if params.get(name + suffix) is not None}
    return found


class Replaced:
    """Attributes of modules that hold another tensor for the time of a scope."""

    def __init__(self) -> None:
        self.entries: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def replace(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """Set the attribute, through `setattr`: an RNN keeps a list of its weights beside."""
        self.entries.append((module, name, module.__dict__[name], tensor))
        setattr(module, name, tensor)

    def put_back(self) -> None:
        """Give the attributes back what they held, unless it is something new."""
        while self.entries:
            module, name, before, tensor = self.entries[-1]
            if module.__dict__.get(name) is tensor:
                setattr(module, name, before)
            self.entries.pop()


def enter_cache(shared: Shared, scale: Tensor | None) -> dict[Any, Any] | None:
    """Where `parametrize.cached()` is on, let a scope have a cache of its own.

    A weight that was computed inside is in low precision and its gradient is scaled; outside it must not be used, nor
    the other way round. Scopes under the same scale share theirs.

    Args:
        shared: of the model that opens the scope.
        scale: the scope's loss scale.

    Returns:
        The cache around the scope, for `leave_cache`; None where there is none.
    """
    if not parametrize._cache_enabled:
        return None
    around: dict[Any, Any] = parametrize._cache
    if shared.cache is None or shared.cache[0] is not around or shared.cache[1] is not scale:
        shared.cache = around, scale, {}
    parametrize._cache = shared.cache[2]
    return around


def leave_cache(around: dict[Any, Any] | None) -> None:
    """Put the cache around a scope back, unless `cached()` has ended since."""
    if around is not None and parametrize._cache_enabled:
        parametrize._cache = around
