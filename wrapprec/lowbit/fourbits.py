"""Linear layers and embeddings of 4-bit weights, by the kernels of bitsandbytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from wrapprec import levels
from wrapprec.lowbit.products import Quantised, library, operands
from wrapprec.lowbit.sizes import BLOCK

if TYPE_CHECKING:
    from wrapprec.forward import Forward


class Linear4(Quantised):
    """A linear layer of 4-bit weights."""

    def pack(self, weight: Tensor) -> Any:
        made = library(self.form).nn.Params4bit(
            weight.detach(),
            requires_grad=False,
            quant_type=self.form[:3],
            compress_statistics=self.form.endswith("-dq"),
            blocksize=BLOCK,
        )
        return made._quantize(weight.device)

    def unpack(self, weight: Any) -> Tensor:
        # As one long row: with rows that are no multiple of a block bitsandbytes' CPU kernel (0.50.2) takes the scales
        # of other blocks.
        state = _state(weight)
        # Not `copy.copy`, which dynamo of torch 2.9 does not enter.
        row = type(state)(
            absmax=state.absmax,
            shape=torch.Size((1, math.prod(state.shape))),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
            offset=state.offset,
            state2=state.state2,
        )
        kernels = library(self.form).functional
        unpacked: Tensor = kernels.dequantize_4bit(weight.detach(), row)
        return unpacked.reshape(state.shape)

    def compute(self, forward: Forward, weight: Any, x: Tensor) -> Tensor:
        rows, columns = self.shape(weight)
        x, bias = operands(forward, (rows, columns), x)
        if levels.any_running():
            return functional.linear(x, self.unpack(weight).to(x.dtype), bias)
        # In two dimensions: the gradient of the bias is summed over the first one alone.
        flat = x.reshape(-1, columns)
        if columns % BLOCK:
            made: Tensor = Unpacked.apply(flat, weight, bias, self)
            return made.reshape((*x.shape[:-1], rows))
        out: Tensor = library(self.form).matmul_4bit(flat, weight, quant_state=_state(weight), bias=bias)
        return out.reshape((*x.shape[:-1], rows))


class Unpacked(Function):
    """A product with a quantised weight that is unpacked for it, and once more for its backward: none is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, runner: Quantised) -> Tensor:
        ctx.weight, ctx.runner = weight, runner
        return functional.linear(x, runner.unpack(weight).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x = grad @ ctx.runner.unpack(ctx.weight).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return x, None, grad.sum(0) if ctx.needs_input_grad[2] else None, None


class Embedding4(Linear4):
    """An embedding of 4-bit weights: the rows that are looked up are unpacked, where a row is a number of blocks."""

    def compute(self, forward: Forward, weight: Any, x: Tensor) -> Tensor:
        module: Any = forward.module
        dtype = forward.lend_dtype or _state(weight).dtype
        if module.embedding_dim % BLOCK:
            return functional.embedding(x, self.unpack(weight)).to(dtype)
        return self._rows(weight, x, module.num_embeddings).to(dtype)

    def _rows(self, weight: Any, x: Tensor, count: int) -> Tensor:
        kernels = library(self.form).functional
        state = _state(weight)
        scales = state.absmax
        if state.nested:
            scales = kernels.dequantize_blockwise(scales, state.state2) + state.offset
        packed = functional.embedding(x, weight.detach().view(count, -1)).reshape(-1, 1)
        width = state.shape[-1]
        chosen = kernels.QuantState(
            absmax=functional.embedding(x, scales.view(count, -1)).reshape(-1),
            shape=torch.Size((x.numel(), width)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        if not x.numel():
            return torch.empty((*x.shape, width), device=x.device)
        rows: Tensor = kernels.dequantize_4bit(packed, chosen).reshape(*x.shape, width)
        return rows


def _state(weight: Any) -> Any:
    """What a 4-bit weight needs to be read; it is left behind when the weight goes to another device."""
    state = weight.quant_state
    if state.absmax.device != weight.device:
        state.to(weight.device)
    return state
