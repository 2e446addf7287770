"""Linear layers of 8-bit weights, and of trained ones that products see rounded to 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from wrapprec import levels
from wrapprec.lowbit.products import Product, Quantised, library, operands

if TYPE_CHECKING:
    from wrapprec.forward import Forward


class Linear8(Quantised):
    """A linear layer of 8-bit weights, one scale a row (LLM.int8 without a threshold for outliers)."""

    def pack(self, weight: Tensor) -> Any:
        bitsandbytes = library("int8")
        codes, scales = round_to_int8(weight.detach())
        return bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)

    def unpack(self, weight: Any) -> Tensor:
        numbers: Tensor = weight.detach() * (_scales(weight) / 127).unsqueeze(1)
        return numbers.to(self.parameter.dtype)

    def compute(self, forward: Forward, weight: Any, x: Tensor) -> Tensor:
        rows, columns = self.shape(weight)
        x, bias = operands(forward, (rows, columns), x)
        if levels.any_running():
            return functional.linear(x, self.unpack(weight).to(x.dtype), bias)
        bitsandbytes = library("int8")
        # A state of its own for each call, which backward keeps.
        state = bitsandbytes.MatmulLtState()
        state.has_fp16_weights, state.CB, state.SCB = False, weight.detach(), _scales(weight)
        out: Tensor = bitsandbytes.matmul(x.reshape(-1, columns), state.CB, bias=bias, state=state)
        return out.reshape((*x.shape[:-1], rows))


class Training8(Product):
    """A linear layer whose float32 weights train, and whose products see them rounded to 8 bits.

    The gradient passes the rounding unchanged (the straight-through estimator), as in bitsandbytes' Linear8bitLt with
    `has_fp16_weights`, whose own backward takes no inputs of three dimensions on CPUs, and misses changes of the weight
    while `.grad` is kept.
    """

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = forward.module
        weight = module.weight
        codes, scales = round_to_int8(weight.detach())
        off = codes * (scales / 127).unsqueeze(1) - weight.detach()
        x: Tensor = args[0] if args else kwargs["input"]
        return functional.linear(x, weight + off.to(weight.dtype), module.bias)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a weight to 127 steps of its largest magnitude.

    bitsandbytes' kernel wants float16, whose range a row may be out of: the row is divided by its largest magnitude.

    Args:
        weight: ``(rows, columns)``.

    Returns:
        The steps, int8, and the largest magnitudes, float32 ``(rows,)``.
    """
    wide = weight.float()
    largest = wide.abs().amax(dim=1)
    unit = wide / largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    kernels = library("int8").functional
    codes, ones, _ = kernels.int8_vectorwise_quant(unit.to(torch.float16))
    return codes, ones * largest


def _scales(weight: Any) -> Tensor:
    scales: Tensor = weight.SCB
    if scales.device != weight.device:
        scales = weight.SCB = scales.to(weight.device)
    return scales
