"""Steps of fused optimizers, whose kernels take the skip as a flag on the device: no host read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Skips:
    """How many steps of an optimizer were skipped. Refers to nothing else, so that who keeps it keeps no model."""

    def __init__(self) -> None:
        self.on_host = 0
        self.on_device: Tensor | None = None  # what only the device knows, float32, shape ()

    def count(self, read: Callable[[Tensor], float]) -> int:
        """All of them.

        Args:
            read: a tensor's value, on the host.
        """
        return self.on_host + (0 if self.on_device is None else int(read(self.on_device)))


def is_fused(optimizer: Optimizer) -> bool:
    """Whether every parameter is stepped by a kernel that honours ``optimizer.found_inf``."""
    takes_flag = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return takes_flag and all(group.get("fused") for group in optimizer.param_groups)


@contextlib.contextmanager
def flagged(optimizer: Any, skip: Tensor) -> Iterator[None]:
    """Hand the flag to the kernel, together with the one that a user's GradScaler has set.

    Args:
        optimizer: a fused one.
        skip: 1.0 to skip; float32, shape ().
    """
    theirs = getattr(optimizer, "found_inf", None)
    optimizer.found_inf = skip if theirs is None else torch.maximum(skip, theirs.to(skip))
    try:
        yield
    finally:
        if theirs is None:
            del optimizer.found_inf
        else:
            optimizer.found_inf = theirs


def prepare_momentum(optimizer: Optimizer) -> bool:
    """Give fused SGD initialised momentum, which its kernel leaves unwritten when the first step is skipped.

    Zeros are what a first step makes of no momentum at all, unless there is dampening.

    Returns:
        False where only the host can tell that a first step must not happen.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    missing = [
        (group, param)
        for group in optimizer.param_groups
        for param in group["params"]
        if group["momentum"] and param.grad is not None and optimizer.state[param].get("momentum_buffer") is None
    ]
    if any(group["dampening"] for group, _ in missing):
        return False
    for _, param in missing:
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return True
