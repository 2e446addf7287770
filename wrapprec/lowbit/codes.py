"""Turns a tensor of optimizer state into codes of 8 or 4 bits with one scale a block, and back."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from wrapprec.backends.select import backend_for
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


def quantise(tensor: Tensor, bits: int, signed: bool, salt: Tensor | None = None) -> Low:
    """Quantise, each value to the nearest code of its block, or with 4 bits by chance to one of the two around it.

    Args:
        tensor: floating, of any shape.
        bits: 8 (bitsandbytes' dynamic map, blocks of 256) or 4 (torchao's maps, blocks of 128).
        signed: False for what is never negative, such as second moments; no such value becomes zero.
        salt: the number of the step, of which chance depends, beside the values.

    Returns:
        ``codes`` (uint8, flat; two to a byte where bits is 4), ``absmax`` (float32, one a block; with 4 bits the sign
        is that of the largest; nan where one of the block is), ``bits``, ``signed`` and the ``dtype`` of the tensor.
    """
    flat = tensor.detach().to(torch.float32).reshape(-1)
    codes, absmax = _quantise_8(flat, signed) if bits == 8 else _quantise_4(flat, signed, salt)
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
    # bitsandbytes' kernels make a number of it.
    lost = torch.nn.functional.pad(flat.isnan(), (0, -flat.numel() % CODE_BLOCK[8])).view(-1, CODE_BLOCK[8]).any(1)
    return codes, absmax.masked_fill(lost, torch.nan)


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


@functools.cache
def _values(signed: bool) -> tuple[float, ...]:
    """The 16 values of a code, ascending, as float32 has them: torchao's maps.

    Its map of what is never negative is linear: the least is a sixteenth of the largest, and in its place the root of
    a smaller second moment, by which Adam divides, is many times too large. Here its third powers are taken.
    """
    module = torchao("optim.subclass_4bit", WISH[4])
    values = module.get_qmap_signed() if signed else [value**3 for value in module.get_qmap_unsigned()]
    return tuple(torch.tensor(values, dtype=torch.float32, device="cpu").tolist())


@functools.cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    """These values where they are looked up. Made once: the host waits for what it sends to a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(_values(signed), dtype=torch.float32, device="cpu").to(device)


def _quantise_4(flat: Tensor, signed: bool, salt: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round by chance to one of the two levels around each number, so that the expectation is the number itself.

    Numbers outside of the levels become the nearest one: see `_largest`; second moments below 1/4096 of the largest.

    To nearest, an average of gradients would stay where it is: what a step adds is less than half of a level.
    """
    pieces = [_round_piece(piece, signed, i * _PIECE, salt) for i, piece in enumerate(flat.split(_PIECE))]
    codes, largest = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return codes, largest


def _round_piece(flat: Tensor, signed: bool, start: int, salt: Tensor | None) -> tuple[Tensor, Tensor]:
    levels = _levels(signed, flat.device)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % CODE_BLOCK[4])).view(-1, CODE_BLOCK[4])
    largest = _largest(blocks)
    ratio = (blocks / torch.where(largest == 0, 1.0, largest).unsqueeze(1)).view(-1)
    # Faster than torch.bucketize on CPUs, and XLA devices have none.
    upper = torch.ones_like(ratio, dtype=torch.int32)
    for level in _values(signed)[1:-1]:
        upper += ratio > level
    low, high = levels[upper - 1], levels[upper]
    share = (ratio - low) / (high - low)
    codes = (upper - (chance(ratio, start, salt) >= share).to(upper.dtype)).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], largest


def _largest(blocks: Tensor) -> Tensor:
    """The largest number of each block, with its sign: it becomes one, which is a level. Minus one is none.

    What is as large, with the other sign, becomes the least level, -0.8875. A scale at which that level is as large as
    this number would be right for it on average, and was tried: it is up to an eighth larger for all of the block, and
    the square of the error grew by 4 % for normally distributed numbers.
    """
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)
    # On XLA's CPUs the largest of numbers with a nan among them is a number.
    return largest.masked_fill(blocks.isnan().any(1), torch.nan)


def _dequantise_4(codes: Tensor, largest: Tensor, signed: bool) -> Tensor:
    kind = torchao("optim.subclass_4bit", WISH[4]).OptimState4bit
    values = _levels(signed, codes.device)
    flat: Tensor = kind(codes, largest, values, signed, (codes.numel() * 2,)).dequantize()
    return flat


_WORD = 2**32 - 1

_PIECE = 2**20
"""How many numbers are rounded at once: on the way each of them takes some 40 bytes."""


def chance(values: Tensor, start: int, salt: Tensor | None) -> Tensor:
    """Random numbers that need no generator, and so none whose state would have to be saved.

    They are mixed from the bits of the values, their places and the salt, by the finalizer of MurmurHash3.

    Args:
        values: float32, flat.
        start: the place of the first one.
        salt: a scalar on any device, such as the number of the step, which makes equal values of two steps differ.

    Returns:
        Float32 in [0, 1), in the shape of the values.
    """
    mixed = torch.arange(start, start + values.numel(), device=values.device) * 0x9E3779B1
    mixed += backend_for(values.device).read_bits(values.contiguous(), torch.int32)
    if salt is not None:
        mixed += salt.to(values.device, torch.int64) * 0x7FEB352D
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed &= _WORD
        mixed ^= mixed >> shift
        mixed *= factor
    mixed &= _WORD
    mixed ^= mixed >> 16
    return (mixed >> 8).to(torch.float32) * 2.0**-24
