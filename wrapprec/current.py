"""Which scope each thread has open, and what this torch's autocast can be relied on for."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from wrapprec.scope import Scope


class _Thread(threading.local):
    def __init__(self) -> None:
        # In the instance's own dict from the start: dynamo guards on whether it is there.
        self.scope: Scope | None = None


thread = _Thread()
"""The innermost scope that this thread has open."""


@functools.lru_cache(maxsize=1)
def cache_is_sound() -> bool:
    """Whether autocast's cache keeps casts made under no_grad from those with a graph; not so in torch 2.9.

    A weight that was used under no_grad first, on any thread, would get no gradient.
    """
    weight, x = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            torch.mm(x, weight)
        return torch.mm(x, weight).requires_grad
