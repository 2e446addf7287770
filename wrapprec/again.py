"""Runs a checkpointed function again, in backward, inside the scope in which it was called.

What the recomputation needs to know (which scale is in force, which precision is around, what is lent) is known where
`torch.utils.checkpoint` is called. So, while a scope is open on some thread, the two names by which `checkpoint` makes
its reentrant and its other form are replaced; a thread that has no scope open passes through. Checkpoints of other
packages are left to `recompute`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import checkpoint as checkpoints

from wrapprec import audit
from wrapprec.cast import tensors_in
from wrapprec.current import thread
from wrapprec.island import float32, is_island_open
from wrapprec.recompute import Extent
from wrapprec.replicas import replicated
from wrapprec.scope import Scope

if TYPE_CHECKING:
    from wrapprec.forward import Forward

_changing = threading.Lock()
"""Held while the names are replaced or put back."""

_inside: set[int] = set()
"""The threads that have a scope open. A set, so that an interrupt between opening and closing loses no count."""


class Again:
    """A checkpointed function that was called inside a scope: in backward it opens the same scope once more.

    Args:
        function: what was given to `checkpoint`.
        scope: the innermost one that is open on this thread.
        reentrant: the graph of the second run is what gradients go through, and no audit of the loss has seen it.
    """

    def __init__(self, function: Callable[..., Any], scope: Scope, reentrant: bool) -> None:
        self.function = function
        self.reentrant = reentrant
        # Not kept alive: it holds the weights that were lent to the original run.
        self.scope = weakref.ref(scope)
        self.levels: list[tuple[Forward, Any, Any, list[Any]]] = []
        level: Scope | None = scope
        while isinstance(level, Scope):
            self.levels.insert(0, (level.opener, level.border, level.region, _refer(level)))
            level = level.outer
        self.island = is_island_open()
        self.mending = scope.mending

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if thread.scope is not None and thread.scope is self.scope():
            return self.function(*args, **kwargs)
        opened: list[Scope] = []
        replicas = contextlib.ExitStack()
        try:
            for opener, border, region, objects in self.levels:
                if opener.replica is not None:
                    opener, _ = replicas.enter_context(replicated(opener.replica.origin, opener.module, ()))
                scope = Scope(opener, Extent(), border)
                opened.append(scope)
                thread.scope = scope
                scope.region = region
                scope.lend(opener.tree())
                scope.enter_again([one for one in (ref() for ref in objects) if one is not None])
            enter(opened[0])
            # Autocast is as it was: `checkpoint` has seen to that. The modes of ours are not.
            with contextlib.ExitStack() as modes:
                if self.mending is not None:
                    opened[-1].mending = modes.enter_context(self.mending.again())
                if self.island:
                    modes.enter_context(float32())
                out = self.function(*args, **kwargs)
            for scope in reversed(opened):
                out = scope.leave_again(out)
            if self.reentrant:
                self._audit(opened, out, (args, kwargs))
            return out
        finally:
            for scope in reversed(opened):
                scope.close()
            if opened:
                leave(opened[0])
            replicas.close()

    def _audit(self, opened: list[Scope], out: Any, given: Any) -> None:
        # Whether the backward is audited was known when the original scope was left.
        if any(border is not None and border.audited for _, border, _, _ in self.levels):
            around = tuple(scope.border for scope in opened if scope.border is not None)
            modules = [scope.opener.module for scope in opened]
            audit.walk(tensors_in(out), modules, around=around, known=tensors_in(given))


def _refer(scope: Scope) -> list[Any]:
    """The objects that a scope was given; not kept alive, as they may hold what has the checkpoint in its graph."""
    refs: list[Any] = []
    for one in () if scope.carried is None else scope.carried.opaque:
        try:
            refs.append(weakref.ref(one))
        except TypeError:
            refs.append(functools.partial(_same, one))
    return refs


def _same(one: Any) -> Any:
    return one


class _Reentrant(checkpoints.CheckpointFunction):
    """Stands in for `CheckpointFunction`, the reentrant form."""

    @classmethod
    def apply(cls, function: Any, *args: Any, **kwargs: Any) -> Any:
        return _before["CheckpointFunction"].apply(_again(function, reentrant=True), *args, **kwargs)


def _generator(
    function: Any, preserve: bool = True, context_fn: Any = checkpoints.noop_context_fn, *args: Any, **kwargs: Any
) -> Any:
    """Stands in for what makes the other form; `checkpoint` itself makes the first call."""
    if thread.scope is not None and context_fn is not checkpoints.noop_context_fn:
        context_fn = functools.partial(_uncached, context_fn)
    before = _before["_checkpoint_without_reentrant_generator"]
    return before(_again(function), preserve, context_fn, *args, **kwargs)


def _uncached(context_fn: Any) -> tuple[Any, Any]:
    """The contexts of a selective checkpoint, without autocast's cache.

    It counts operations, and finds others in the recomputation when the first run took a weight from the cache.
    """
    first, second = context_fn()
    return _Uncached(first), _Uncached(second)


class _Uncached:
    """A context in which autocast casts a weight at every use."""

    def __init__(self, inner: contextlib.AbstractContextManager[Any]) -> None:
        self.inner = inner

    def __enter__(self) -> Any:
        self.before = torch.is_autocast_cache_enabled()
        entered = self.inner.__enter__()
        torch.set_autocast_cache_enabled(False)
        return entered

    def __exit__(self, *raised: Any) -> Any:
        torch.set_autocast_cache_enabled(self.before)
        return self.inner.__exit__(*raised)


_OURS: dict[str, Any] = {
    "CheckpointFunction": _Reentrant,
    "_checkpoint_without_reentrant_generator": _generator,
}

_names: dict[str, Any] = vars(checkpoints)

_before: dict[str, Any] = {name: getattr(checkpoints, name) for name in _OURS}
"""What stood there before. It stays here when it is put back: another thread may be on its way."""


def _again(function: Any, reentrant: bool = False) -> Any:
    scope = thread.scope
    return Again(function, scope, reentrant) if isinstance(scope, Scope) else function


def enter(scope: Scope) -> None:
    """A scope has opened: checkpoints that are called inside remember it."""
    if scope.outer is not None:
        return
    with _changing:
        if not _inside:
            for name, ours in _OURS.items():
                now = _names[name]
                if now is not ours:
                    _before[name] = now
                    _names[name] = ours
        _inside.add(get_ident())


def leave(scope: Scope) -> None:
    """A scope has closed; the last one puts torch's own names back."""
    if scope.outer is not None:
        return
    with _changing:
        _inside.discard(get_ident())
        if not _inside:
            for name, ours in _OURS.items():
                # Unless somebody else has replaced ours since.
                if _names[name] is ours:
                    _names[name] = _before[name]
