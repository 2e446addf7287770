"""Has the processes that a script starts find their models, too: forked, spawned, in pools."""

from __future__ import annotations

import functools
import multiprocessing.process
import multiprocessing.util
import sys
import threading
from collections.abc import Callable
from typing import Any

_MARK = "_wrapprec"
"""The attribute of a `multiprocessing.Process` that carries a `Start` to the process that it starts."""


class Start:
    """Makes the process that unpickles it watch, and tells a forked one how to speak.

    Args:
        begin: called with the arguments in a process that was spawned; importable; returns the `Children` there.
        arguments: for it.
        speaks: whether that process says what it wrapped.
        named: whether it says so under its name.
    """

    def __init__(self, begin: Callable[..., Children], arguments: tuple[Any, ...], speaks: bool, named: bool) -> None:
        self.begin, self.arguments = begin, arguments
        self.speaks, self.named = speaks, named

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.begin, self.arguments, self.speaks, self.named)


def _arrived(begin: Callable[..., Children], arguments: tuple[Any, ...], speaks: bool, named: bool) -> Start:
    start = Start(begin, arguments, speaks, named)
    begin(*arguments).arrive(start)
    return start


class Children:
    """Watches over the processes that are started.

    Args:
        begin: see `Start`.
        arguments: see `Start`.
        forked: called in each process when it begins, with the lines' prefix, or None where it is to be silent.
        ended: called in each process before it ends.
    """

    def __init__(
        self,
        begin: Callable[..., Children],
        arguments: tuple[Any, ...],
        forked: Callable[[str | None], None],
        ended: Callable[[], None],
    ) -> None:
        self.started = False
        self.ranked = False
        self._begin, self._arguments = begin, arguments
        self._forked, self._ended = forked, ended
        self._replaced: list[tuple[Any, str, Any]] = []
        self._ranks = threading.local()
        self._last: Any = None

    def install(self) -> None:
        """Watch the starts from now on."""
        start = multiprocessing.process.BaseProcess.start
        self._replace(multiprocessing.process.BaseProcess, "start", self._marking(start))
        for module in _spawning():
            self._replace(module, "start_processes", self._first_speaks(module.start_processes))
        # Runs in every process that multiprocessing forks from here; one that is spawned unpickles its `Start`.
        multiprocessing.util.register_after_fork(self, Children._after_fork)

    def remove(self) -> None:
        """Leave multiprocessing as it was."""
        while self._replaced:
            setattr(*self._replaced.pop())

    def _replace(self, home: Any, name: str, value: Any) -> None:
        self._replaced.append((home, name, getattr(home, name)))
        setattr(home, name, value)

    def _marking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def start(process: Any) -> None:
            if _loads_data(process):
                original(process)
                return
            first = getattr(self._ranks, "first", None)
            if first is None:
                self.started = True
            self._ranks.first = None if first is None else False
            process.__dict__[_MARK] = Start(self._begin, self._arguments, first is not False, first is None)
            try:
                original(process)
            finally:
                process.__dict__.pop(_MARK, None)

        return start

    def _first_speaks(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of the ranks that torch.multiprocessing starts, which do the same, one speaks."""

        @functools.wraps(original)
        def start_processes(*args: Any, **kwargs: Any) -> Any:
            self.ranked, self._ranks.first = True, True
            try:
                return original(*args, **kwargs)
            finally:
                self._ranks.first = None

        return start_processes

    def _after_fork(self) -> None:
        start = multiprocessing.process.current_process().__dict__.get(_MARK)
        if self._replaced and isinstance(start, Start):
            self.arrive(start)

    def arrive(self, start: Start) -> None:
        """Begin in a process of its own.

        Args:
            start: what it was given.
        """
        self.started = self.ranked = False
        self._ranks = threading.local()
        name = multiprocessing.process.current_process().name
        self._forked((f"{name}: " if start.named else "") if start.speaks else None)
        # After the finalizers of the script's own. A forkserver's child, in some versions, comes here a second time.
        if self._last is not None:
            self._last.cancel()
        self._last = multiprocessing.util.Finalize(None, self._ended, exitpriority=-1000)


def _loads_data(process: Any) -> bool:
    """Whether it is a worker of a DataLoader, which trains nothing and is started again each epoch."""
    target = getattr(process, "_target", None)
    return str(getattr(target, "__module__", "")).startswith("torch.utils.data.")


def _spawning() -> list[Any]:
    import torch.multiprocessing

    return [torch.multiprocessing, sys.modules["torch.multiprocessing.spawn"]]
