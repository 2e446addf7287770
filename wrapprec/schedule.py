"""When an audit of a graph is due."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_FIRST = 3
_EVERY = 1000


class Schedule:
    """When an audit of one wrapped model is due: its first backwards, after a change, and now and then."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Audit the next backwards again: after `wrap`, after a checkpoint was loaded, after modules changed."""
        self.left = _FIRST
        self.forwards = 0
        # The hooks that were there at the last look: torch's count of all, and the newest on a module inside.
        self.last_hook = self.newest_hook = -1
        self.known: set[Any] = set()

    def is_due(self, signature: Any) -> bool:
        """Count a forward, and say whether the next backward is audited.

        Args:
            signature: the module that was called, its mode and the structure of what it returned.
        """
        self.forwards += 1
        if signature not in self.known:
            self.known.add(signature)
            self.left = max(self.left, 1)
        if self.forwards % _EVERY == 0:
            self.left = max(self.left, 1)
        return self.left > 0

    def has_new_hooks(self, modules: Iterable[nn.Module]) -> bool:
        """Say whether a forward hook was put on one of the modules since the last look: it may take tensors out."""
        # Every hook of torch takes a number from here: nothing to look for where it is as it was.
        if self.last_hook == RemovableHandle.next_id:
            return False
        self.last_hook = RemovableHandle.next_id
        newest = max((max((*m._forward_hooks, *m._forward_pre_hooks), default=-1) for m in modules), default=-1)
        fresh, self.newest_hook = newest > self.newest_hook, max(newest, self.newest_hook)
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts anew; the known structures hold classes that need not be picklable.
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.restart()
