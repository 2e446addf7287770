"""Turns a tensor of optimizer state into codes of 8 or 4 bits with one scale a block, and back."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from wrapprec.dtypes import LOW, name
from wrapprec.errors import StepError, message
from wrapprec.lowbit.packages import bitsandbytes, torchao
from wrapprec.lowbit.sizes import CODE_BLOCK

Low = dict[str, Any]
"""A quantised tensor, in types that ``torch.load(weights_only=True)`` takes, and torch's optimizers leave alone.

They would make a generator's name of a string that they load.
"""

_KEYS = {"codes", "absmax", "bits", "signed", "dtype"}
_SMALL = 2.0**-9

WISH = {8: "optimizer_bits=8", 4: "optimizer_bits=4"}


def is_low(value: object) -> bool:
    """Whether this is a quantised tensor.

    It is a dict, so that an optimizer that was never converted, and loads it, raises instead of computing with codes.
    """
    return isinstance(value, dict) and value.keys() == _KEYS


def quantise(tensor: Tensor, bits: int, signed: bool) -> Low:
    """Quantise, each value to the nearest code of its block.

    Args:
        tensor: floating, of any shape.
        bits: 8 (bitsandbytes' dynamic map, blocks of 256) or 4 (torchao's maps, blocks of 128).
        signed: False for what is never negative, such as second moments; no such value becomes zero.

    Returns:
        ``codes`` (uint8, flat; two to a byte where bits is 4), ``absmax`` (float32, one a block), ``bits``, ``signed``
        and the ``dtype`` of the tensor.
    """
    flat = tensor.detach().to(torch.float32).reshape(-1)
    codes, absmax = (_quantise_8 if bits == 8 else _quantise_4)(flat, signed)
    return {"codes": codes, "absmax": absmax, "bits": bits, "signed": signed, "dtype": tensor.dtype}


def dequantise(low: Low, like: Tensor) -> Tensor:
    """Give back the values that `quantise` rounded to.

    Args:
        low: from `quantise`; also as an optimizer that was never converted has loaded it.
        like: has the shape, device and strides that the state has: the parameter.
    """
    low = restore(low)
    codes, absmax = low["codes"].to(like.device), low["absmax"].to(like.device)
    flat = (_dequantise_8 if low["bits"] == 8 else _dequantise_4)(codes, absmax, low["signed"])[: like.numel()]
    # Not the parameter's: the state of low precision weights may be kept in float32.
    dtype = low["dtype"]
    if dtype is torch.float32 and like.is_contiguous():
        return flat.view(like.shape)
    return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(flat.view(like.shape))


def restore(low: Low) -> Low:
    """Make codes of what an optimizer that was never converted made of them when it loaded them: floats.

    Raises:
        StepError: they were rounded to low precision then, and a scale may have become zero.
    """
    if low["codes"].dtype is torch.uint8:
        return low
    if low["absmax"].dtype in LOW:
        raise StepError(
            message(
                f"state in {low['bits']} bits, loaded by an optimizer that was converted before",
                f"scales that torch has rounded to {name(low['absmax'].dtype)}, the dtype of the parameter",
                remedy="give the optimizer to wrap, or handle.attach, before its load_state_dict",
            )
        )
    return {**low, "codes": low["codes"].to(torch.uint8), "absmax": low["absmax"].to(torch.float32)}


def size(low: Low) -> int:
    """Bytes of a quantised tensor."""
    return int(low["codes"].nbytes + low["absmax"].nbytes)


def load_kernels(bits: int) -> None:
    """Import what computes with this number of bits.

    Raises:
        PolicyError: it is not installed.
    """
    if bits == 8:
        bitsandbytes(WISH[8])
    else:
        torchao("optim.subclass_4bit", WISH[4])


# 8 bits


@functools.cache
def _map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of a code, ascending, in [-1, 1]."""
    values: Tensor = bitsandbytes(WISH[8]).functional.create_dynamic_map(signed=signed)
    if not signed:
        # A second moment that became zero would leave its first moment to be divided by epsilon alone.
        values[0] = values[1] / 2
    return values.to(device)


def _quantise_8(flat: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    values = _map(signed, flat.device)
    codes, state = bitsandbytes(WISH[8]).functional.quantize_blockwise(flat, code=values, blocksize=CODE_BLOCK[8])
    absmax: Tensor = state.absmax
    if _loses_small_values(flat.device):
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % CODE_BLOCK[8])).view(-1, CODE_BLOCK[8])
        small = (blocks.abs() < (absmax * _SMALL).unsqueeze(1)).view(-1)[: flat.numel()].nonzero().squeeze(1)
        ratio = flat[small] / absmax[small // CODE_BLOCK[8]]
        codes[small] = torch.bucketize(ratio, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return codes, absmax


def _dequantise_8(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = _map(signed, codes.device)
    flat: Tensor = bitsandbytes(WISH[8]).functional.dequantize_blockwise(
        codes, absmax=absmax, code=values, blocksize=CODE_BLOCK[8]
    )
    return flat


@functools.cache
def _loses_small_values(device: torch.device) -> bool:
    """Whether bitsandbytes' kernel rounds what is small beside its block's largest value to something else.

    The one for CPUs of 0.50 looks codes up in bins of 2**-15 of the largest: zero becomes 2.1e-5 of it, and a weight
    that never had a gradient would drift.
    """
    values = _map(True, device)
    probe = torch.zeros(CODE_BLOCK[8], device=device)
    probe[0], probe[1] = 1.0, values[values > 0][1]
    codes, _ = bitsandbytes(WISH[8]).functional.quantize_blockwise(probe, code=values, blocksize=CODE_BLOCK[8])
    return not torch.equal(values[codes.int()], probe)


# 4 bits


def _quantise_4(flat: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % CODE_BLOCK[4])).view(-1, CODE_BLOCK[4])
    # torchao takes 1e-12 for the least scale, which is a large second moment.
    absmax = blocks.abs().amax(1)
    blocks = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    module = torchao("optim.subclass_4bit", WISH[4])
    # What torchao's subclass for states calls: inside of that, XLA's tensors fail. Scaled again, for blocks below tiny.
    blocks, _ = module.scale_tensor(blocks.view(-1), CODE_BLOCK[4])
    codes = module.quantize_4bit_with_qmap(blocks, _values_4(signed, flat.device))
    return (codes[::2] << 4) | codes[1::2], absmax


@functools.cache
def _values_4(signed: bool, device: torch.device) -> Tensor:
    """The 16 values of a code, ascending. Made once: the host waits for what it sends to a GPU."""
    module = torchao("optim.subclass_4bit", WISH[4])
    values = module.get_qmap_signed() if signed else module.get_qmap_unsigned()
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device="cpu").to(device)


def _dequantise_4(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    module = torchao("optim.subclass_4bit", WISH[4])
    values = _values_4(signed, codes.device)
    flat: Tensor = module.OptimState4bit(codes, absmax, values, signed, (codes.numel() * 2,)).dequantize()
    return flat
