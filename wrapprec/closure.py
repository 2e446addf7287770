"""Steps with a closure: on overflow back off and evaluate again, so that no bad gradient is ever used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from wrapprec.errors import StepError, message

_MOST_EVALUATIONS = 160
"""Before a step is given up: from 2**127 down to 2**-32 by halves."""


class GiveUp(Exception):
    """Leaves an optimizer's step whose closure cannot be evaluated to finite gradients."""


class Guard:
    """A closure that gives an optimizer finite gradients, or leaves its step by `GiveUp`.

    Args:
        optimizer: whose step evaluates it.
        closure: the user's.
        overflowed: judges the gradients after an evaluation: (skip, the scale cannot go lower).
        zeroed: whether `optimizer.zero_grad()` was called since it was last asked.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        overflowed: Callable[[], tuple[bool, bool]],
        zeroed: Callable[[], bool],
    ) -> None:
        self.optimizer = optimizer
        self.closure = closure
        self.overflowed = overflowed
        self.zeroed = zeroed
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.loss: Any = None
        self.finite_evaluations = 0
        # An LBFGS changes parameters between its evaluations, and writes its state before the first.
        self._backup: tuple[list[Tensor], dict[Tensor, Any]] | None = None
        if isinstance(optimizer, LBFGS):
            values = [p.detach().clone() for p in self.params]
            # The keys are the parameters themselves: they must not be copied.
            self._backup = values, {param: copy.deepcopy(state) for param, state in optimizer.state.items()}

    def __call__(self) -> Any:
        for _ in range(_MOST_EVALUATIONS):
            before = [p.grad for p in self.params]
            self.zeroed()
            self.loss = self.closure()
            overflow, lowest = self.overflowed()
            if not overflow:
                self.finite_evaluations += 1
                return self.loss
            # Gradients that the closure accumulates into rather than replaces cannot be made again.
            kept = any(b is not None and b is p.grad for b, p in zip(before, self.params, strict=True))
            if lowest or (kept and not self.zeroed()):
                break
            for param in self.params:
                param.grad = None
        raise GiveUp

    def put_back(self) -> None:
        """Undo a step that was left in the middle.

        Raises:
            StepError: the optimizer is not known to be restorable.
        """
        if self._backup is None:
            if self.finite_evaluations == 0:
                return
            raise StepError(
                message(
                    "an optimizer that evaluates its closure once, before it changes anything, or torch.optim.LBFGS",
                    f"{type(self.optimizer).__name__}, whose later evaluation overflowed at the lowest loss scale",
                    remedy="use a policy without a loss scale ('bf16-mixed', '32-true'), or a lower learning rate",
                )
            )
        values, state = self._backup
        with torch.no_grad():
            for param, value in zip(self.params, values, strict=True):
                param.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
