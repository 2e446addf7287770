"""Finds where inf or nan first appears: switched on when steps keep being skipped, for one forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wrapprec.cast import tensors_in
from wrapprec.errors import module_label
from wrapprec.lent import originals

if TYPE_CHECKING:
    from wrapprec.forward import Forward

_HOPELESS = (
    "a lower loss scale cannot help, forward itself is not finite: look at the data and the learning rate, or keep this"
    " module in float32 with a Rule"
)


@dataclass
class _Output:
    """An output, and whether it leaves the model there, so that its gradient comes from the loss."""

    where: str
    leaves: bool = False


class Diagnosis:
    """What one forward and its backward showed; it reads tensors on the host, so it is on only before an error."""

    def __init__(self) -> None:
        self.forward_finding: str | None = None
        self.loss_finding: str | None = None
        self.backward_finding: str | None = None
        self._depth = 0
        # A tensor that is the output of a module, and of those around it: watched once, for the innermost.
        self._watched: dict[int, tuple[Tensor, _Output]] = {}
        # A forward has run under it.
        self.complete = False

    def call(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Run a module's original forward and look at its parameters, inputs, outputs and their gradients."""
        label = module_label(forward.name, forward.module)
        for name, param in originals(forward.module).items():
            if param is not None and not _finite(param):
                self._note(f"parameter {name!r} of module {label} holds inf or nan")
        if not all(_finite(t) for t in tensors_in((args, kwargs))):
            self._note(f"an input of module {label} holds inf or nan")
        self._depth += 1
        try:
            run = forward.runner
            out = forward.original(*args, **kwargs) if run is None else run(forward, args, kwargs)
        finally:
            self._depth -= 1
        opens = self._depth == 0
        self.complete |= opens
        for tensor in tensors_in(out):
            if not _finite(tensor):
                self._note(f"module {label} returned inf or nan from finite inputs, in {tensor.dtype}")
            if tensor.requires_grad:
                self._watch(tensor, label, opens)
        if opens:
            self._watched.clear()
        return out

    def _watch(self, tensor: Tensor, label: str, opens: bool) -> None:
        if id(tensor) not in self._watched:
            output = _Output(f"the output of module {label}")
            self._watched[id(tensor)] = tensor, output
            tensor.register_hook(lambda grad: self._see(grad, output.where, output.leaves))
        self._watched[id(tensor)][1].leaves = opens

    def watch_weight(self, forward_name: str, key: str, weight: Tensor) -> None:
        """Look at the gradient of a lent weight, in the dtype it is computed in."""
        if weight.requires_grad:
            qualified = f"{forward_name}.{key}" if forward_name else key
            weight.register_hook(lambda grad: self._see(grad, f"parameter {qualified!r}", False))

    def _note(self, finding: str) -> None:
        self.forward_finding = self.forward_finding or finding

    def _see(self, grad: Tensor, where: str, leaves: bool) -> None:
        if self.backward_finding is not None or self.loss_finding is not None or _finite(grad):
            return
        # What comes in from the loss was only multiplied by the scale: that makes no nan, and an inf only where the
        # product is rounded to float16.
        if leaves and (grad.dtype is not torch.float16 or bool(grad.isnan().any())):
            self.loss_finding = f"the gradient that the loss sends into {where} holds inf or nan already"
        else:
            self.backward_finding = f"the gradient of {where} holds inf or nan, in {grad.dtype}"

    def finding(self) -> tuple[str, str]:
        """What was found, and the remedy."""
        if self.forward_finding is not None:
            return self.forward_finding, _HOPELESS
        if self.loss_finding is not None:
            return (
                f"forward is finite, but {self.loss_finding}",
                "a lower loss scale cannot help, the loss or its gradient is not finite: look at how it is computed"
                " (log, sqrt or division at 0) and at its targets",
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
    if values.is_quantized or not (values.is_floating_point() or values.is_complex()):
        return True
    values = values.coalesce().values() if values.layout is torch.sparse_coo else values
    return bool(torch.isfinite(values).all())
