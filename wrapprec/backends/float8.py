"""Whether a device multiplies fp8 numbers itself, and what to say where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wrapprec.dtypes import is_format
from wrapprec.precision import Precision


@dataclass(frozen=True)
class Float8:
    """What a type of device can do with fp8.

    Args:
        multiplies: whether a device of this type has kernels that multiply it. Elsewhere its numbers are raised to
            float32, in which their products are exact, and multiplied there.

    >>> Float8(lambda device: False).multiplies(torch.device("cpu"))
    False
    """

    multiplies: Callable[[torch.device], bool]


def advise(precision: Precision, float8: Float8 | None, device: torch.device) -> str | None:
    """Say what fp8, and quantised weights, come to on a device.

    Args:
        precision: what the policy asks for.
        float8: what devices of this type can do with it; None where neither of the two is computed at all.
        device: which one.

    Returns:
        The advice; None where there is none.
    """
    if float8 is None and is_format(precision.param_dtype):
        return (
            f"quantised weights have not been tried on {device.type}: they stay in float32, of which bfloat16 is made"
        )
    if precision.compute_dtype != "fp8":
        return None
    if float8 is None:
        return f"fp8 has not been tried on {device.type}: bfloat16 is used in its place"
    if float8.multiplies(device):
        return None
    return (
        f"fp8 is emulated on this {device.type}, for tests: its numbers are raised to float32 and multiplied exactly, "
        "more slowly than bfloat16; kernels need CUDA of compute capability 8.9 or ROCm's gfx94, or newer"
    )
