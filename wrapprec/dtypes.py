"""The names of dtypes and of storage formats: parse them, print them."""

from __future__ import annotations

import sys
from typing import TypeAlias

import torch

from wrapprec.errors import PolicyError, message, nearest

Dtype: TypeAlias = torch.dtype | str
"""A torch dtype, or the name of a format that torch has no plain dtype for."""

LOW = frozenset({torch.float16, torch.bfloat16})
"""What counts as low precision."""

MIXABLE = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""What is cast; float64 stays what it is, unless some module of the model computes in it."""

REAL = MIXABLE | {torch.float64}
"""Every dtype that parameters are stored in."""

WEIGHT_FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")
COMPUTE_FORMATS = ("fp8", "tf32")

_SPELLINGS: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: ("float32", "f32", "fp32", "32", "float"),
    torch.float16: ("float16", "f16", "fp16", "16", "half"),
    torch.bfloat16: ("bfloat16", "bf16"),
    torch.float64: ("float64", "f64", "fp64", "64", "double"),
}
_SHORT = {dtype: spellings[1] for dtype, spellings in _SPELLINGS.items()}
_BY_NAME: dict[str, Dtype] = {s: dtype for dtype, spellings in _SPELLINGS.items() for s in spellings}
_BY_NAME |= {sys.intern(s): sys.intern(s) for s in (*WEIGHT_FORMATS, *COMPUTE_FORMATS)}


def parse_dtype(spec: str | torch.dtype) -> Dtype:
    """Read a dtype or format name.

    Args:
        spec: a torch dtype, one of its spellings in any case (`float32`, `f32`, `fp32`, `torch.float32`), or a
            format name (`nf4`, `int8`, `fp8`, `tf32`, ...).

    Returns:
        The torch dtype, or the format as an interned string.

    Raises:
        PolicyError: the name is unknown, or the dtype is not one that training runs in.

    >>> parse_dtype("BF16"), parse_dtype("torch.float16"), parse_dtype("nf4")
    (torch.bfloat16, torch.float16, 'nf4')
    """
    if isinstance(spec, torch.dtype):
        if spec in _SPELLINGS:
            return spec
    elif isinstance(spec, str):
        found = _BY_NAME.get(spec.strip().lower().removeprefix("torch."))
        if found is not None:
            return found
    hint = nearest(spec.strip().lower(), _BY_NAME) if isinstance(spec, str) else ""
    raise PolicyError(
        message(
            f"a dtype name, one of {', '.join(_BY_NAME)}",
            f"{spec!r} (of type {type(spec).__name__})",
            remedy=f"{hint}write one of these names",
        )
    )


def is_format(dtype: Dtype) -> bool:
    """Say whether this is a format that torch has no plain dtype for.

    Args:
        dtype: what `parse_dtype` returns.

    Returns:
        True for `nf4` and the like.

    >>> is_format("nf4"), is_format(torch.float32)
    (True, False)
    """
    return isinstance(dtype, str)


def is_low(dtype: Dtype) -> bool:
    """Say whether computing in this dtype or format is low precision.

    Args:
        dtype: what `parse_dtype` returns.

    Returns:
        True for float16, bfloat16 and every format but `tf32`, which leaves dtypes as they are.

    >>> is_low(torch.bfloat16), is_low("fp8"), is_low("tf32"), is_low(torch.float64)
    (True, True, False, False)
    """
    return dtype != "tf32" if isinstance(dtype, str) else dtype in LOW


def name(dtype: Dtype) -> str:
    """Print a dtype in full; `parse_dtype` reads it back.

    Args:
        dtype: a dtype or a format.

    Returns:
        The name without `torch.`.

    >>> name(torch.float32), name("nf4-dq")
    ('float32', 'nf4-dq')
    """
    return str(dtype).removeprefix("torch.")


def short(dtype: Dtype) -> str:
    """Print a dtype in three or four letters; `parse_dtype` reads it back.

    Args:
        dtype: a dtype or a format.

    Returns:
        `f32`, `f16`, `bf16`, `f64`, or the format's name.

    >>> short(torch.float32), short(torch.bfloat16), short("fp8")
    ('f32', 'bf16', 'fp8')
    """
    return dtype if isinstance(dtype, str) else _SHORT.get(dtype, name(dtype))
