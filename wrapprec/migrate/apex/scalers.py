"""Loss scales as plain objects on the host, of `apex.fp16_utils`; a wrapped model has its own, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["DynamicLossScaler", "LossScaler", "overflowed"]


def overflowed(params: Iterable[Tensor]) -> bool:
    """Whether a gradient holds inf or nan; reads the device, once.

    Args:
        params: of any dtypes; those without a gradient are passed over.
    """
    grads = [param.grad for param in params if param.grad is not None]
    return bool(grads) and not math.isfinite(float(nn.utils.get_total_norm(grads, math.inf)))


class LossScaler:
    """A loss scale that stays.

    Args:
        scale: the factor.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.cur_scale = scale

    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """Whether gradients are to be dropped: never."""
        return False

    def update_scale(self, overflow: bool) -> None:
        """Take note of a step."""

    @property
    def loss_scale(self) -> float:
        """The factor."""
        return self.cur_scale

    def scale_gradient(self, module: Any, grad_in: Any, grad_out: Any) -> tuple[Any, ...]:
        """Multiply what goes on in a backward hook."""
        return tuple(None if grad is None else self.loss_scale * grad for grad in grad_in)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Differentiate the loss times the factor."""
        (loss.float() * self.loss_scale).backward(retain_graph=retain_graph)


class DynamicLossScaler(LossScaler):
    """A loss scale that falls where gradients overflow, and rises when they did not for a while.

    Args:
        init_scale: the first; 2**15 is the largest that a float16 loss can have, where Apex began at 2**32 and skipped
            as many steps more.
        scale_factor: what it falls and rises by.
        scale_window: good steps before it rises.
    """

    def __init__(self, init_scale: float = 2.0**15, scale_factor: float = 2.0, scale_window: int = 1000) -> None:
        super().__init__(init_scale)
        self.cur_iter = 0
        self.last_overflow_iter = -1
        self.scale_factor = scale_factor
        self.scale_window = scale_window

    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """Whether a gradient holds inf or nan; reads the device."""
        return overflowed(params)

    def update_scale(self, overflow: bool) -> None:
        """Fall or, every `scale_window` good steps, rise."""
        if overflow:
            self.cur_scale = max(self.cur_scale / self.scale_factor, 1.0)
            self.last_overflow_iter = self.cur_iter
        elif (self.cur_iter - self.last_overflow_iter) % self.scale_window == 0:
            self.cur_scale *= self.scale_factor
        self.cur_iter += 1
