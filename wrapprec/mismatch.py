"""Turns torch's error about dtypes into one that names the module, its placement and the rule that would mend it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from wrapprec.dtypes import name
from wrapprec.errors import DtypeMismatchError, WrapprecError, message, module_label

if TYPE_CHECKING:
    from wrapprec.forward import Forward

_ABOUT_DTYPES = re.compile(
    r"dtype|scalar type|same type|data type|should be the same"
    r"|not implemented for '(Half|BFloat16)'|of type (Half|BFloat16)"
    r"|(Half|BFloat16|Float).*(expected|but (got|found))",
    re.IGNORECASE,
)


_ABOUT_RANGE = re.compile(r"cannot be converted to type .*(Half|BFloat16) without overflow")
_ABOUT_KERNELS = re.compile(r"could not create a primitive")

_ABOUT_INDICES = re.compile(r"\b(Long|Int|int64|int32)\b|indices", re.IGNORECASE)
_LOW = re.compile(r"Half|BFloat16|float16", re.IGNORECASE)


def mismatch(forward: Forward, error: Exception) -> DtypeMismatchError | None:
    """Explain an error of a module's forward.

    Args:
        forward: of the innermost module that was running.
        error: what its operation raised.

    Returns:
        The error to raise instead, with `error` as its cause; None if dtypes are not the matter, or nothing is low
        precision in this model, so that it would have been raised unwrapped too.
    """
    text = str(error)
    expected = None if isinstance(error, WrapprecError) else _expected(text)
    if not forward.shared.mixed or expected is None:
        return None
    if _ABOUT_INDICES.search(text) and not _LOW.search(text):
        return None  # the caller's own slip, precision has no part in it
    placement = forward.shared.plan.placement_or_none(forward.name)
    if placement is None:
        return None
    precision = placement.precision
    where = (
        f"{module_label(forward.name, forward.module)}, which computes in {name(precision.compute_dtype)}"
        f" (casting {precision.casting or 'none'}; decided by {placement.rule})"
    )
    rule = f'Rule("{forward.name}", "float32")' if forward.name else "Rule(type(model), 'float32') or policy '32-true'"
    return DtypeMismatchError(
        message(
            expected,
            text.splitlines()[0],
            where=where,
            remedy=f"add rules=[{rule}], or put the operation under `with wrapprec.float32():`",
        )
    )


def _expected(text: str) -> str | None:
    """What torch would have taken, going by its error; None where that is not about dtypes."""
    if _ABOUT_RANGE.search(text):
        return "numbers within the range of the dtype that a module computes in"
    if _ABOUT_KERNELS.search(text):
        return "a module in a dtype that its kernel computes in on this device"
    return "operations on tensors of one dtype inside a wrapped model" if _ABOUT_DTYPES.search(text) else None
