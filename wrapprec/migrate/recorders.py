"""Lets a script that `wrapprec run` runs export its model, as it would alone: what is recorded is the float32 model."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from wrapprec.current import thread
from wrapprec.migrate.saving import stores_low
from wrapprec.standin import StandIn, forward_of, place_of, take_away

_RECORDERS = (
    ("torch.jit", "trace"),
    ("torch.jit", "trace_module"),
    # What `torch.jit.script` calls for modules. It must not be called by another frame itself: it looks names up there.
    ("torch.jit._recursive", "create_script_module"),
    ("torch.onnx", "export"),
    ("torch.export", "export"),
)


class Recorders:
    """Takes what stands in for forwards away while a recorder runs, and puts it back.

    Args:
        models: gives the models that were wrapped and live.
    """

    def __init__(self, models: Callable[[], Iterable[nn.Module]]) -> None:
        self._models = models
        self._replaced: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Do so from now on."""
        for home, name in _RECORDERS:
            module = sys.modules.get(home)
            original = getattr(module, name, None)  # the private one may go
            if original is not None:
                self._replaced.append((module, name, original))
                ours = self._around(original)
                ours.__module__ = home  # where pickle looks for it
                setattr(module, name, ours)

    def remove(self) -> None:
        """Leave torch as it was."""
        while self._replaced:
            setattr(*self._replaced.pop())

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def record(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for model in self._models() if thread.scope is None else ():
                    stack.enter_context(_plain(model))
                return original(*args, **kwargs)

        return record


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """A wrapped model without what stands in for its forwards; as it is where its weights are low precision ones."""
    modules = [] if stores_low(model) else [one for one in model.modules() if isinstance(forward_of(one), StandIn)]
    standins = [(one, place_of(one), forward_of(one)) for one in modules]
    for one in modules:
        take_away(one)
    try:
        yield
    finally:
        for one, place, standin in standins:
            one.__dict__[place] = standin
