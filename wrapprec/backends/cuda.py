"""CUDA (and ROCm, which torch presents as CUDA) devices; on a machine without one, nothing here calls CUDA."""

from __future__ import annotations

import torch
from torch import nn

from wrapprec.backends.base import Backend, Capability, Lending
from wrapprec.backends.fast import Switches
from wrapprec.backends.float8 import Float8
from wrapprec.errors import PolicyError, message
from wrapprec.precision import Precision


def _multiplies_float8(device: torch.device) -> bool:
    if not torch.cuda.is_available():
        return False
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).startswith(("gfx94", "gfx95", "gfx12"))
    return (properties.major, properties.minor) >= (8, 9)


class CudaBackend(Backend):
    """The CUDA backend.

    >>> CudaBackend().lending.multi_tensor
    True
    """

    name = "cuda"
    lending = Lending(bucket_elements=2**22, multi_tensor=True)
    switches = Switches(
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        (torch.backends.cudnn.conv, "fp32_precision", "tf32"),  # type: ignore[attr-defined]
        (torch.backends.cudnn.rnn, "fp32_precision", "tf32"),
    )

    float8 = Float8(_multiplies_float8)

    def has_bfloat16(self, device: torch.device) -> bool:
        """Say whether a device computes in bfloat16 natively.

        Args:
            device: a CUDA device.

        Returns:
            False also where CUDA is not available.
        """
        if not torch.cuda.is_available():
            return False
        # As in torch.cuda.is_bf16_supported(including_emulation=False), but for a device that need not be the current.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)

    def capability(self, device: torch.device) -> Capability:
        """See `Backend.capability`."""
        bfloat16 = self.has_bfloat16(device)
        fast = {torch.float32, torch.float16} | ({torch.bfloat16} if bfloat16 else set())
        float8 = self.float8.multiplies(device)
        notes = (
            "bfloat16 is native" if bfloat16 else "bfloat16 is not native",
            "float8 is native" if float8 else "float8 is not native",
        )
        low = frozenset({torch.bfloat16, torch.float16})
        return Capability("cuda", low, frozenset(fast), self.scaling, notes, self.mixed_norms(device))

    def advise(self, precision: Precision, device: torch.device) -> str | None:
        """See `Backend.advise`."""
        low = precision.compute_dtype == torch.bfloat16
        if low and torch.cuda.is_available() and not self.has_bfloat16(device):
            return "this GPU has no native bfloat16 (compute capability 8.0 has); 16-mixed is the better choice"
        return super().advise(precision, device)

    def auto(self, device: torch.device) -> tuple[str, str]:
        """See `Backend.auto`.

        Raises:
            PolicyError: there is no CUDA device to ask.
        """
        if not torch.cuda.is_available():
            raise PolicyError(
                message(
                    "a CUDA device for the policy 'auto'",
                    f"{device}, but torch finds no CUDA device",
                    remedy="name the policy, e.g. 'bf16-mixed', or move the model to a device that is there",
                )
            )
        if self.has_bfloat16(device):
            return "bf16-mixed", "this GPU computes in bfloat16"
        return "16-mixed", "this GPU has no native bfloat16"

    def accepts_mixed_norm(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
        """See `Backend.accepts_mixed_norm`."""
        return torch.cuda.is_available() and super().accepts_mixed_norm(module, dtype, device)

    def runs_rnn(self, module: nn.Module, dtype: torch.dtype, autocasts: bool, device: torch.device) -> bool:
        """See `Backend.runs_rnn`."""
        return not torch.cuda.is_available() or super().runs_rnn(module, dtype, autocasts, device)
