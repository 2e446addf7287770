"""XLA devices (TPU, and the CPU device of PJRT): everything is traced, so nothing here reads a tensor on the host."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wrapprec.backends.base import Backend, Capability, Lending
from wrapprec.backends.counted import Counted
from wrapprec.dtypes import Dtype
from wrapprec.precision import Precision

_HALF_AS = torch.bfloat16
"""What float16 becomes: it is no type of a TPU, and bfloat16 needs no loss scale."""


_CODES = {torch.float32: "F32", torch.int32: "S32", torch.bfloat16: "BF16", torch.int16: "S16"}


@functools.cache
def _bitcast() -> Any:
    """An operation that torch_xla 2.9 lacks: its `view(dtype)` is computed on the host."""
    from torch_xla.core import xla_builder, xla_op_registry  # type: ignore[import-not-found,unused-ignore]

    def lower(operand: Any, code: str) -> Any:
        return operand.bitcast(getattr(xla_builder.Type, code))

    return xla_op_registry.register("wrapprec_bitcast", lower)


class XlaBackend(Backend):
    """The XLA backend, for tensors of torch_xla.

    >>> XlaBackend().auto(torch.device("xla"))[0]
    'bf16-mixed'
    """

    name = "xla"
    # The compiler fuses the casts, whichever way they were written.
    lending = Lending(bucket_elements=0, multi_tensor=False)
    scaling = False
    in_pieces = False

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

    def accepts_mixed_norm(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
        """See `Backend.accepts_mixed_norm`: none, though torch_xla 2.9 runs the norms over a batch or an instance.

        The gradient of their inputs then says that it is bfloat16, and is float32 in the compiled program, where the
        layers before go on with it in float32. With casts around the norm their products are bfloat16, and nothing is
        lost: the program casts for its batch norm, which is float32, either way.
        """
        return False

    def advise(self, precision: Precision, device: torch.device) -> str | None:
        """See `Backend.advise`."""
        if precision.surroundings == self.native(precision):
            return super().advise(precision, device)
        return "float16 is no type of XLA devices: bfloat16 is used in its place, without a loss scale"

    def read_bits(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Bits.read_bits`."""
        found: Tensor = _bitcast()(tensor, code=_CODES[dtype])
        return found

    def generator(self, device: torch.device) -> Counted:
        """See `Bits.generator`."""
        return Counted(device)
