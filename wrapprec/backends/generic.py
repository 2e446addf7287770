"""Any other accelerator that torch knows (mps, xpu, hpu, privateuse): not tried on a device so far."""

from __future__ import annotations

import functools

import torch

from wrapprec.backends import ABSENT
from wrapprec.backends.base import Backend, Capability, Lending
from wrapprec.errors import PolicyError, message


def is_accelerator(kind: str) -> bool:
    """Say whether torch can compute on devices of a type, with autocast.

    Args:
        kind: a device type.

    >>> is_accelerator("meta")
    False
    """
    try:
        return kind != "meta" and torch.amp.is_autocast_available(kind)
    except RuntimeError:
        return False


class GenericBackend(Backend):
    """A device type about which nothing is known but what can be tried there.

    Args:
        name: the device type.
    """

    lending = Lending(bucket_elements=2**22, multi_tensor=False)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @functools.cached_property
    def _low(self) -> tuple[torch.dtype, ...]:
        """The low precisions in which a small matrix product agrees with float32, the better one first."""
        return tuple(dtype for dtype in (torch.bfloat16, torch.float16) if self._multiplies(dtype))

    def _multiplies(self, dtype: torch.dtype) -> bool:
        true = torch.linspace(-1, 1, 64).reshape(8, 8)
        try:
            low = true.to(self.name, dtype)
            product = (low @ low).float().cpu()
        except ABSENT:
            return False
        # Operands and result are rounded once each.
        return bool((product - true @ true).abs().max() <= 8 * torch.finfo(dtype).eps)

    def capability(self, device: torch.device) -> Capability:
        """See `Backend.capability`."""
        fast = frozenset({torch.float32, *self._low})
        notes = ("wrapprec has not been tried on this type of device",)
        return Capability(self.name, frozenset(self._low), fast, self.scaling, notes, self.mixed_norms(device))

    def auto(self, device: torch.device) -> tuple[str, str]:
        """See `Backend.auto`.

        Raises:
            PolicyError: there is no such device to ask.
        """
        if torch.bfloat16 in self._low:
            return "bf16-mixed", f"{self.name} computes in bfloat16 (tried)"
        if torch.float16 in self._low:
            return "16-mixed", f"{self.name} computes in float16, not in bfloat16 (tried)"
        raise PolicyError(
            message(
                f"a {self.name} device that computes in bfloat16 or float16, for the policy 'auto'",
                f"{device}, on which neither could be tried",
                remedy="name the policy, e.g. 'bf16-mixed', or move the model to a device that is there",
            )
        )
