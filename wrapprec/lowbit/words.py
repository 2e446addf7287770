"""Splits a float32 number into a 16-bit weight and a 16-bit remainder, puts it together again, and rounds by chance.

A bfloat16 is the upper half of a float32. So a weight in bfloat16, rounded to nearest, and the signed difference of the
bit patterns are the float32 number, all of it. For float16, whose exponents differ, the remainder counts 2**-15ths of
the weight's last place, which is exact wherever the weight is not subnormal.

What is bfloat16 here is computed in integers only: some devices take subnormal numbers for zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrapprec.backends.select import backend_for

_INF = 0x7F80  # of bfloat16
_NAN = 0x7FC00000  # of float32
_LEAST, _MOST = -(2**15), 2**15 - 1
_HALF_UNIT = 10  # bits of float16 after the leading one
_HALF_LEAST = -14  # exponent of the smallest normal float16
_REST = 15  # bits of the remainder, without the sign


def bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits, read as another dtype of the same size.

    >>> bits(torch.tensor([1.0]), torch.int32).item() == 0x3F800000
    True
    """
    return backend_for(tensor.device).read_bits(tensor, dtype)


def split(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to the nearest low precision number, and keep what that leaves.

    Args:
        wide: float32.
        dtype: bfloat16 (ties go away from zero, so that each remainder has one weight) or float16.

    Returns:
        The weight in `dtype`, and the remainder, int16; zero where the number is inf or nan.

    >>> split(torch.tensor([1.0, 1.001953125]), torch.bfloat16)
    (tensor([1., 1.], dtype=torch.bfloat16), tensor([    0, 16384], dtype=torch.int16))
    """
    if dtype is torch.float16:
        low = wide.to(dtype)
        rest = torch.ldexp(wide - low.to(wide.dtype), -_unit(low))
        return low, rest.round().nan_to_num(0, 0, 0).clamp(_LEAST, _MOST).to(torch.int16)
    word = _word(wide)
    upper = _upper(word + 0x8000)
    return bits(upper.to(torch.int16), dtype), (word - (upper << 16)).to(torch.int16)


def combine(low: Tensor, rest: Tensor) -> Tensor:
    """The number that `split` has split.

    Where somebody has changed the weight since, a stale remainder changes the number by half a unit in the weight's
    last place at most; inf and nan stay what they are.

    Args:
        low: bfloat16 or float16.
        rest: int16, of the same shape.

    Returns:
        float32.

    >>> combine(*split(torch.tensor([1.001953125]), torch.bfloat16))
    tensor([1.0020])
    """
    if low.dtype is torch.float16:
        wide = low.to(torch.float32)
        whole = wide + torch.ldexp(rest.to(torch.float32), _unit(low))
        return torch.where(low.isfinite() & (rest != 0), whole, wide)  # inf, nan and -0.0 stay
    word = bits(low, torch.int16).to(torch.int32)
    size = word & 0x7FFF
    kept = torch.where(size == 0, rest.clamp(min=0), rest)  # below a zero's bits are those of a nan
    kept = torch.where(size == _INF, kept.clamp(max=0), kept)
    return bits((word << 16) + kept, torch.float32)


def _unit(half: Tensor) -> Tensor:
    """The exponent of what one unit of the remainder of a float16 is worth; int32."""
    exponent = torch.frexp(half.to(torch.float32)).exponent - 1
    exponent = torch.where(half == 0, _HALF_LEAST, exponent)
    return exponent.clamp(min=_HALF_LEAST) - _HALF_UNIT - _REST


def round_by_chance(wide: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
    """Round up or down, with probabilities by which the expectation is the number itself.

    Numbers past the largest finite one become that: no chance makes a weight inf. inf and nan stay.

    Args:
        wide: float32.
        dtype: bfloat16 or float16.
        generator: where the random bits come from, see `draw`.

    Returns:
        A tensor in `dtype`, of the same shape.

    >>> generator = torch.Generator().manual_seed(0)
    >>> round_by_chance(torch.full((8,), 1 + 2**-9), torch.bfloat16, generator)
    tensor([1.0000, 1.0000, 1.0000, 1.0078, 1.0000, 1.0000, 1.0000, 1.0000],
           dtype=torch.bfloat16)
    """
    if dtype is torch.bfloat16:
        # Of the magnitude, whatever the sign: it is the lower bits of both.
        upper = _upper(_word(wide) + draw(generator, wide, 16))
        over = ((upper & 0x7FFF) == _INF) & wide.isfinite()
        return bits((upper - over.to(torch.int32)).to(torch.int16), dtype)
    exponent = (torch.frexp(wide).exponent - 1).clamp(min=_HALF_LEAST) - _HALF_UNIT
    count = torch.ldexp(wide, -exponent)
    floor = count.floor()
    unit = torch.full((), -24, dtype=torch.int32, device=wide.device)  # made there: a copy from the host waits
    chance = torch.ldexp(draw(generator, wide, 24).to(torch.float32), unit)
    rounded = torch.ldexp(floor + (chance < count - floor), exponent).to(dtype)
    most = torch.finfo(dtype).max
    rounded = torch.where(rounded.isinf(), wide.clamp(-most, most).to(dtype), rounded)
    return torch.where(wide.isfinite(), rounded, wide.to(dtype))


def draw(generator: Any, like: Tensor, count: int) -> Tensor:
    """Random bits: one number below ``2**count`` for each of a tensor, int32, where it is.

    Args:
        generator: of torch, or one that has a `draw` of its own.
        like: gives the shape and the device.
        count: how many bits a number has.
    """
    if not isinstance(generator, torch.Generator):
        drawn: Tensor = generator.draw(like.shape, count)
        return drawn
    noise = torch.empty(like.shape, dtype=torch.int32, device=generator.device)
    return noise.random_(0, 2**count, generator=generator).to(like.device)


def _word(wide: Tensor) -> Tensor:
    """The bits of a float32, those of one nan for all: from others' a sum could carry over into those of a zero."""
    return torch.where(wide.isnan(), _NAN, bits(wide.contiguous(), torch.int32))


def _upper(word: Tensor) -> Tensor:
    """The upper half, with its sign. On XLA a shift is a division, which rounds negative numbers to zero."""
    return (word & ~0xFFFF) >> 16
