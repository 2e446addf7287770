"""Notices a module that was copied shallowly, and so carries the Forward of the module it was copied from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from wrapprec.forward import Forward

_CALLERS = ("_call_impl", "inner")
"""Where `nn.Module.__call__` calls forward: directly, and with hooks."""


def called_on(forward: Forward, depth: int) -> nn.Module:
    """The module whose call has led here.

    Args:
        forward: what was called.
        depth: how many frames above the caller of this function the call was made.

    Returns:
        The Forward's own module, or the shallow copy (``copy.copy(module)``, a replica of nn.DataParallel) that was
        called.
    """
    frame = sys._getframe(depth + 1)
    module: Any = frame.f_locals.get("self") if frame.f_code.co_name in _CALLERS else None
    if not isinstance(module, nn.Module) or module is forward.module or module.__dict__.get("forward") is not forward:
        return forward.module
    return module
