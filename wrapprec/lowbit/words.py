"""Splits a float32 number into a 16-bit weight and a 16-bit remainder, puts it together again, and rounds by chance.

A bfloat16 is the upper half of a float32. So a weight in bfloat16, rounded to nearest, and the signed difference of the
bit patterns are the float32 number, all of it. For float16, whose exponents differ, the remainder counts 2**-15ths of
the weight's last place, which is exact wherever the weight is not subnormal.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST, _MOST = -(2**15), 2**15 - 1
_HALF_UNIT = 10  # bits of float16 after the leading one
_HALF_LEAST = -14  # exponent of the smallest normal float16
_REST = 15  # bits of the remainder, without the sign


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
    bits = wide.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    rest = bits - (upper << 16)
    # The bits of a nan can carry over into those of a zero, and inf has no remainder.
    finite = wide.isfinite()
    low = torch.where(finite, upper.to(torch.int16).view(torch.bfloat16), wide.to(torch.bfloat16))
    return low, (rest * finite).to(torch.int16)


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
    wide = low.to(torch.float32)
    if low.dtype is torch.float16:
        whole = wide + torch.ldexp(rest.to(torch.float32), _unit(low))
        return torch.where(low.isfinite() & (rest != 0), whole, wide)  # inf, nan and -0.0 stay
    kept = torch.where(low == 0, rest.clamp(min=0), rest)  # below a zero's bits are those of a nan
    kept = torch.where(low.isinf(), kept.clamp(max=0), kept)
    return (wide.view(torch.int32) + kept.to(torch.int32)).view(torch.float32)


def _unit(half: Tensor) -> Tensor:
    """The exponent of what one unit of the remainder of a float16 is worth; int32."""
    exponent = torch.frexp(half.to(torch.float32)).exponent - 1
    exponent = torch.where(half == 0, _HALF_LEAST, exponent)
    return exponent.clamp(min=_HALF_LEAST) - _HALF_UNIT - _REST


def round_by_chance(wide: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round up or down, with probabilities by which the expectation is the number itself.

    Numbers past the largest finite one become that: no chance makes a weight inf. inf and nan stay.

    Args:
        wide: float32.
        dtype: bfloat16 or float16.
        generator: where the random bits come from.

    Returns:
        A tensor in `dtype`, of the same shape.

    >>> generator = torch.Generator().manual_seed(0)
    >>> round_by_chance(torch.full((8,), 1 + 2**-9), torch.bfloat16, generator)
    tensor([1.0000, 1.0000, 1.0000, 1.0078, 1.0000, 1.0000, 1.0000, 1.0000],
           dtype=torch.bfloat16)
    """
    noise = torch.empty(wide.shape, dtype=torch.int32, device=generator.device)
    if dtype is torch.float16:
        noise.random_(0, 2**24, generator=generator)
        exponent = (torch.frexp(wide).exponent - 1).clamp(min=_HALF_LEAST) - _HALF_UNIT
        count = torch.ldexp(wide, -exponent)
        floor = count.floor()
        up = torch.ldexp(
            noise.to(wide.device).to(torch.float32), torch.full((), -24, dtype=torch.int32, device=wide.device)
        )
        rounded = torch.ldexp(floor + (up < count - floor), exponent).to(dtype)
    else:
        noise.random_(0, 2**16, generator=generator)
        # Of the magnitude, whatever the sign: it is the lower bits of both.
        bits = wide.contiguous().view(torch.int32) + noise.to(wide.device)
        rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    most = torch.finfo(dtype).max
    rounded = torch.where(rounded.isinf(), wide.clamp(-most, most).to(dtype), rounded)
    return torch.where(wide.isfinite(), rounded, wide.to(dtype))
