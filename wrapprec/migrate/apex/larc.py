"""Apex's LARC, an optimizer around another one, whose learning rates follow the ratio of weights to gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["LARC"]


class LARC(Optimizer):
    """Layer-wise adaptive rate control (arXiv:1708.03888) around an optimizer, whose groups and state it shares.

    A parameter ``w`` with gradient ``g`` gets ``(g + weight_decay * w) * rate``, where ``rate`` is
    ``trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)``, divided by the learning rate and at most 1 where
    it clips.

    Args:
        optimizer: which steps; its weight decay is added here.
        trust_coefficient: in the rate.
        clip: at the learning rate of the group (LARC), or scale it (LARS).
        eps: in the rate.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = LARC(torch.optim.SGD([weight], lr=1.0), trust_coefficient=0.5, clip=False)
    >>> weight.grad = torch.tensor([0.0, 2.0])
    >>> optimizer.step()  # rate 0.5 * 5 / 2
    >>> weight.data
    tensor([3.0000, 1.5000])
    """

    def __init__(
        self, optimizer: Optimizer, trust_coefficient: float = 0.02, clip: bool = True, eps: float = 1e-8
    ) -> None:
        self.trust_coefficient = trust_coefficient
        self.clip = clip
        self.eps = eps
        super().__init__([{"params": []}], optimizer.defaults)
        self.optim = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optim.param_groups if hasattr(self, "optim") else []

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        """Nothing: only torch sets it, while this is built."""

    @property
    def state(self) -> Any:
        """That of the optimizer."""
        return self.optim.state

    @state.setter
    def state(self, value: Any) -> None:
        """Nothing: only torch sets it, while this is built."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer."""
        if hasattr(self, "optim"):
            self.optim.add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the optimizer."""
        self.optim.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Rescale the gradients, and step.

        Args:
            closure: computes a loss and its gradients, once, before they are rescaled.

        Returns:
            The loss of the closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group.get("weight_decay", 0) for group in self.param_groups]
        try:
            for group, decay in zip(self.param_groups, decays, strict=True):
                self._rescale(group, decay)
                group["weight_decay"] = 0
            self.optim.step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss

    @torch.no_grad()
    def _rescale(self, group: dict[str, Any], decay: float) -> None:
        for param in group["params"]:
            if param.grad is None:
                continue
            weight, grad = param.norm(), param.grad.norm()
            rate = self.trust_coefficient * weight / (grad + decay * weight + self.eps)
            if self.clip:
                rate = (rate / group["lr"]).clamp(max=1.0)
            scaled = (param.grad + decay * param) * rate
            # Where either norm is zero there is no ratio: Apex leaves such a gradient alone, weight decay included.
            param.grad.copy_(torch.where((weight != 0) & (grad != 0), scaled, param.grad))
