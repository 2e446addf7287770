"""The modes in which weights are lent, those of the scope's opening, and whether autocast's cache may be on."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _pop_mode_temporarily
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from wrapprec import levels

_NOTHING = contextlib.nullcontext()

graphs_lend = torch.__version__ >= "2.13"  # compared as versions
"""Whether a compiled part of an eager model may lend its weights under a loss scale.

Its backward writes flags that others have written since its forward. Torch 2.9 takes that for a spoilt saved tensor.
"""


class Modes:
    """What is on when a scope opens."""

    def __init__(self) -> None:
        self.inference = torch.is_inference_mode_enabled()
        self.transforms = levels.depth()

    def restore(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which they are on again, and no selective checkpoint sees what runs.

        Gradients are on under no_grad, too: code inside forward may enable them again.
        """
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        hidden = _selecting() if torch._C._len_torch_dispatch_stack() else 0
        if levels.depth() == self.transforms and inference is self.inference and not hidden:
            return _NOTHING if grad is not inference else torch.set_grad_enabled(not inference)
        modes = contextlib.ExitStack()
        for _ in range(hidden):
            modes.enter_context(_pop_mode_temporarily())
        modes.enter_context(levels.without(self.transforms))
        modes.enter_context(torch.inference_mode(self.inference))
        modes.enter_context(torch.set_grad_enabled(not self.inference))
        return modes


def _selecting() -> int:
    """How many dispatch modes to set aside, so that no selective checkpoint is among the rest.

    It knows operations by their count: what is lent within it in the first run need not be in the recomputation.
    """
    depth: int = torch._C._len_torch_dispatch_stack()
    for index in range(depth):
        if isinstance(torch._C._get_dispatch_stack_at(index), (_CachedTorchDispatchMode, _CachingTorchDispatchMode)):
            return depth - index
    return 0


@functools.lru_cache(maxsize=1)
def cache_is_sound() -> bool:
    """Whether autocast's cache keeps casts made under no_grad from those with a graph; not so in torch 2.9.

    A weight that was used under no_grad first, on any thread, would get no gradient.
    """
    # Where autocast("cpu") looks, whatever the user's default device is.
    weight, x = torch.ones(1, 1, device="cpu", requires_grad=True), torch.ones(1, 1, device="cpu")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            torch.mm(x, weight)
        return torch.mm(x, weight).requires_grad
