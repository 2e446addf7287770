"""Lets a script that `wrapprec run` runs save whole models as it would alone: they load without wrapprec."""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wrapprec.migrate.roots import params_in
from wrapprec.standin import StandIn, place_of

_SAVERS: tuple[tuple[Any, str], ...] = (
    (torch.serialization, "save"),
    (torch, "save"),
    (pickle, "dump"),
    (pickle, "dumps"),
)


class Saving:
    """Leaves what `wrap` put on modules out of files. Copies that processes and `copy.deepcopy` make keep it."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []
        self._local = threading.local()
        self._lock = threading.Lock()
        self._savers = 0
        self._put_back: Callable[[], None] = lambda: None

    def install(self) -> None:
        """Do so from now on."""
        ours: dict[Any, Any] = {}  # one for both names of `torch.save`, as it was
        for module, name in _SAVERS:
            original = getattr(module, name)
            self._replaced.append((module, name, original))
            if original not in ours:
                ours[original] = self._around(original)
            # Where pickle looks for it when a script hands the function itself to another process.
            ours[original].__module__ = module.__name__
            setattr(module, name, ours[original])

    def remove(self) -> None:
        """Leave torch and pickle as they were."""
        while self._replaced:
            setattr(*self._replaced.pop())

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def save(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "known", None) is not None:  # `torch.save` given this module's `pickle`
                return original(*args, **kwargs)
            self._local.known = {}
            self._begin()
            try:
                return original(*args, **kwargs)
            finally:
                self._local.known = None
                self._end()

        return save

    def _begin(self) -> None:
        """Have modules reduced our way, for as long as any thread saves: some save while the next step computes."""
        with self._lock:
            self._savers += 1
            if self._savers > 1:
                return
            before = nn.Module.__dict__.get("__reduce_ex__")

            def __reduce_ex__(module: nn.Module, protocol: Any) -> Any:
                reduced = (before or object.__reduce_ex__)(module, protocol)
                known = getattr(self._local, "known", None)
                return reduced if known is None else _plain(module, reduced, known)

            def put_back() -> None:
                if before is None:
                    del nn.Module.__reduce_ex__
                else:
                    nn.Module.__reduce_ex__ = before  # type: ignore[method-assign]

            nn.Module.__reduce_ex__ = __reduce_ex__  # type: ignore[method-assign, assignment]
            self._put_back = put_back

    def _end(self) -> None:
        with self._lock:
            self._savers -= 1
            if not self._savers:
                self._put_back()


def _plain(module: nn.Module, reduced: Any, known: dict[int, bool]) -> Any:
    """What pickle makes of a module, less what stands in for its forward; as it is where weights are low precision."""
    place = place_of(module)
    state: Any = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    standin = state.get(place) if isinstance(state, dict) else None
    if not isinstance(standin, StandIn):
        return reduced
    shared: Any = standin.shared  # type: ignore[attr-defined]
    if id(shared) not in known:
        known[id(shared)] = stores_low(shared.model or module)
    if known[id(shared)]:
        return reduced
    state = {key: value for key, value in state.items() if key != place}
    if standin.replaced is not None:
        state[place] = standin.original
    return *reduced[:2], state, *reduced[3:]


def stores_low(model: nn.Module) -> bool:
    """Whether the weights themselves are of low precision, which needs wrapprec wherever they are used.

    Args:
        model: the root.
    """
    return any(not param.is_floating_point() or param.itemsize < 4 for param in params_in(model))
