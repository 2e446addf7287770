"""Watches what a script builds and calls: torch is patched once for all who want to know, and put back at the end."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Watched:
    """A method that is replaced as long as someone watches, whoever of them ends first.

    Args:
        home: the class.
        name: of the method.
        around: makes of what is there what takes its place.

    Attributes:
        watchers: in the order in which they came.
    """

    def __init__(self, home: type, name: str, around: Callable[[Any], Any]) -> None:
        self.watchers: tuple[Any, ...] = ()
        self._home, self._name, self._around = home, name, around
        self._original: Any = None
        self._ours: Any = None

    def add(self, watcher: Any) -> None:
        """Let one watch.

        Args:
            watcher: nothing happens where it does.
        """
        if watcher not in self.watchers:
            self.watchers = (*self.watchers, watcher)
        if (there := getattr(self._home, self._name)) is not self._ours:
            self._original, self._ours = there, self._around(there)
            setattr(self._home, self._name, self._ours)

    def discard(self, watcher: Any) -> None:
        """Let one watch no more.

        Args:
            watcher: nothing happens where it does not.
        """
        self.watchers = tuple(one for one in self.watchers if one is not watcher)
        # Where another patch lies on top (torch.fx's, while it traces) and puts ours back later, ours only passes on.
        if not self.watchers and self._ours is not None and getattr(self._home, self._name) is self._ours:
            setattr(self._home, self._name, self._original)
            self._ours = None


def _building(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        for watcher in builds.watchers:
            watcher.expect(optimizer)

    return __init__


# Not a global forward hook: torch has looked up the module's forward already when it calls one.
def _calling(original: Any) -> Any:
    def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not calls.watchers or getattr(_inside, "call", False):
            return original(module, *args, **kwargs)
        _inside.call = True
        try:
            # What the script itself asked for comes before what it is run with.
            for watcher in reversed(builds.watchers):
                if watcher in calls.watchers:
                    watcher.look_at(module)
            out = original(module, *args, **kwargs)
            for watcher in calls.watchers:
                watcher.look_back(module, out)
            return out
        finally:
            _inside.call = False

    return __call__


builds = Watched(Optimizer, "__init__", _building)
"""Optimizers that are built; a watcher has `expect(optimizer)`."""

calls = Watched(nn.Module, "__call__", _calling)
"""Modules that are called from outside of any other; those of `builds` may watch: `look_at(module)` before, and
`look_back(module, out)` after."""

_inside = threading.local()
