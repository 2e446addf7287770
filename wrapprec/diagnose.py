"""Finds where inf or nan first appears: switched on when steps keep being skipped, for one forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wrapprec.cast import tensors_in
from wrapprec.errors import module_label
from wrapprec.lent import originals

if TYPE_CHECKING:
    from wrapprec.region import Forward


class Diagnosis:
    """What one forward and its backward showed; it reads tensors on the host, so it is on only before an error."""

    def __init__(self) -> None:
        self.forward_finding: str | None = None
        self.backward_finding: str | None = None

    def call(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Run a module's original forward and look at its parameters, inputs, outputs and their gradients."""
        label = module_label(forward.name, forward.module)
        for name, param in originals(forward.module).items():
            if param is not None and self.forward_finding is None and not _finite(param):
                self.forward_finding = f"parameter {name!r} of module {label} holds inf or nan"
        if self.forward_finding is None and not all(_finite(t) for t in tensors_in((args, kwargs))):
            self.forward_finding = f"an input of module {label} holds inf or nan"
        out = forward.original(*args, **kwargs)
        for tensor in tensors_in(out):
            if self.forward_finding is None and not _finite(tensor):
                self.forward_finding = f"module {label} returned inf or nan from finite inputs, in {tensor.dtype}"
            if tensor.requires_grad:
                tensor.register_hook(lambda grad, where=f"the output of module {label}": self._see(grad, where))
        return out

    def watch_weight(self, forward_name: str, key: str, weight: Tensor) -> None:
        """Look at the gradient of a lent weight, in the dtype it is computed in."""
        if weight.requires_grad:
            qualified = f"{forward_name}.{key}" if forward_name else key
            weight.register_hook(lambda grad: self._see(grad, f"parameter {qualified!r}"))

    def _see(self, grad: Tensor, where: str) -> None:
        if self.backward_finding is None and not _finite(grad):
            self.backward_finding = f"the gradient of {where} holds inf or nan, in {grad.dtype}"

    def finding(self) -> tuple[str, str]:
        """What was found, and the remedy."""
        if self.forward_finding is not None:
            return (
                self.forward_finding,
                "a lower loss scale cannot help, forward itself is not finite: look at the data, the learning rate, or"
                " keep this module in float32 with a Rule",
            )
        if self.backward_finding is not None:
            return (
                f"forward is finite, but {self.backward_finding}",
                "a lower loss scale could help: lower min_scale, or keep this module in float32 with a Rule",
            )
        return (
            "forward and the gradients inside the model are finite, but a gradient held inf or nan at the step",
            "look at what changes p.grad between backward and step",
        )


def _finite(tensor: Tensor) -> bool:
    values = tensor.detach()
    if not values.is_floating_point() and not values.is_complex():
        return True
    values = values._values() if values.is_sparse else values
    return bool(torch.isfinite(values).all())
