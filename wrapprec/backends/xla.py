"""XLA devices (TPU, and the CPU device of PJRT): everything is traced, so nothing here reads a tensor on the host."""

from __future__ import annotations

from dataclasses import replace

import torch

from wrapprec.backends.base import Backend, Capability, Lending
from wrapprec.dtypes import Dtype
from wrapprec.precision import Precision

_HALF_AS = torch.bfloat16
"""What float16 becomes: it is no type of a TPU, and bfloat16 needs no loss scale."""


class XlaBackend(Backend):
    """The XLA backend, for tensors of torch_xla.

    >>> XlaBackend().auto(torch.device("xla"))[0]
    'bf16-mixed'
    """

    name = "xla"
    # The compiler fuses the casts, whichever way they were written.
    lending = Lending(bucket_elements=0, multi_tensor=False)
    scaling = False

    def capability(self, device: torch.device) -> Capability:
        """See `Backend.capability`."""
        low = frozenset({torch.bfloat16})
        notes = ("float16 becomes bfloat16",)
        return Capability("xla", low, low | {torch.float32}, self.scaling, notes, self.mixed_norms(device))

    def auto(self, device: torch.device) -> tuple[str, str]:
        """See `Backend.auto`."""
        return "bf16-mixed", "bfloat16 is the low precision of XLA devices"

    def native(self, precision: Precision) -> Precision:
        """See `Backend.native`."""

        precision = super().native(precision)

        def has(dtype: Dtype) -> Dtype:
            return _HALF_AS if dtype == torch.float16 else dtype

        return replace(
            precision,
            param_dtype=has(precision.param_dtype),
            compute_dtype=has(precision.compute_dtype),
            output_dtype=has(precision.output_dtype),
        )

    def advise(self, precision: Precision, device: torch.device) -> str | None:
        """See `Backend.advise`."""
        if precision.surroundings == self.native(precision):
            return super().advise(precision, device)
        return "float16 is no type of XLA devices: bfloat16 is used in its place, without a loss scale"
