"""Leaves our frames out of the tracebacks that a script shows by itself: of threads, of processes, in its log."""

from __future__ import annotations

import functools
import threading
import traceback
from typing import Any

from wrapprec.errors import WrapprecError
from wrapprec.migrate.script import is_ours, strip_all


class Frames:
    """Replaces what formats tracebacks, and what shows those of threads."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Do so from now on."""
        for home, name, around in (
            (traceback.TracebackException, "__init__", _formatting),
            (threading, "excepthook", _ending),
        ):
            original = getattr(home, name)
            self._replaced.append((home, name, original))
            setattr(home, name, around(original))

    def remove(self) -> None:
        """Leave both as they were."""
        while self._replaced:
            setattr(*self._replaced.pop())


def _formatting(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(shown: Any, exc_type: Any, *args: Any, **kwargs: Any) -> None:
        original(shown, exc_type, *args, **kwargs)
        stack = getattr(shown, "stack", None)
        if not stack:
            return
        kind = exc_type if isinstance(exc_type, type) else type(exc_type)
        # A defect of ours is shown whole.
        if issubclass(kind, WrapprecError) or not is_ours(stack[-1].filename):
            stack[:] = [frame for frame in stack if not is_ours(frame.filename)]

    return __init__


def _ending(original: Any) -> Any:
    def excepthook(args: Any) -> Any:
        if args.exc_value is not None:
            trace = strip_all(args.exc_value, args.exc_traceback)
            args = threading.ExceptHookArgs((args.exc_type, args.exc_value, trace, args.thread))
        return original(args)

    return excepthook
