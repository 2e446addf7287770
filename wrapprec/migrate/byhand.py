"""Notices models that a script steps by itself, without a torch optimizer: their weights move after a backward."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.parameter import is_lazy

from wrapprec.cast import tensors_in
from wrapprec.migrate.roots import params_in


class _Seen:
    """What is known of one module."""

    def __init__(self) -> None:
        self.has_backward = self.is_told = False
        self.weights: torch.Tensor | None = None

    def arrive(self, grad: torch.Tensor) -> None:
        """A gradient has come: a hook of an output."""
        self.has_backward = True


class ByHand:
    """Tells which modules are trained by hand, from their training forwards. Nothing stays on them or in graphs."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[nn.Module], _Seen]] = {}

    def trains(self, module: nn.Module) -> bool:
        """Say whether a module that is about to be called has moved since a backward went through it.

        Args:
            module: with parameters; it is called from outside of any other.

        Returns:
            True once: the third training forward, at the earliest, finds weights that moved after a gradient came.
        """
        params = _trained(module)
        if not module.training or not params or any(map(_has_no_values, params)):
            return False
        seen = self._of(module)
        if not seen.has_backward or seen.is_told:
            return False
        with torch.no_grad():
            # Sums, once a backward was seen: a training script, which looks here until it has made its first step.
            sums = torch.stack([_sum(param) for param in params])
        before, seen.weights = seen.weights, sums
        seen.is_told = before is not None and before.shape == sums.shape and not torch.equal(before, sums)
        return seen.is_told

    def watch(self, module: nn.Module, out: Any) -> None:
        """Wait for a gradient of what a module gave.

        Args:
            module: that was called.
            out: what it returned.
        """
        found = self._seen.get(id(module))
        if found is not None and not found[1].has_backward:
            for tensor in tensors_in(out):
                if tensor.requires_grad:
                    tensor.register_hook(found[1].arrive)

    def _of(self, module: nn.Module) -> _Seen:
        # Not a WeakKeyDictionary: some modules define `__eq__`, and no `__hash__`.
        ref, seen = self._seen.get(id(module), (None, _Seen()))
        if ref is None or ref() is not module:
            seen = _Seen()
            self._seen[id(module)] = weakref.ref(module), seen
        return seen


def _has_no_values(param: torch.Tensor) -> bool:
    return param.is_meta or is_fake(param)


def _sum(param: torch.Tensor) -> torch.Tensor:
    try:
        total = param.sum(dtype=torch.float64)
    except (TypeError, RuntimeError):  # some devices have no float64
        total = param.sum()
    return total.cpu().double()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in params_in(module) if p.requires_grad and p.is_floating_point() and not is_lazy(p)]
