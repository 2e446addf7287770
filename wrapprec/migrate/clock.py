"""Tells in which precision a script spends its time, by looking at it a hundred times a second."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from types import FrameType

import torch

from wrapprec.dtypes import name
from wrapprec.forward import Forward
from wrapprec.region import Region

_EVERY = 0.01
"""Seconds between two looks."""


class Clock:
    """Samples the stacks of the threads, that of the one which starts it first. Nothing that it tells is exact."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to look at the running thread; a second call does nothing."""
        if self._thread is None:
            ident = threading.get_ident()
            self._thread = threading.Thread(target=self._run, args=(ident,), daemon=True, name="wrapprec-clock")
            self._thread.start()

    def stop(self) -> None:
        """Look no more. The thread is gone then: one that wakes up while the interpreter ends can abort the process."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, ident: int) -> None:
        # No name for the frame here: until the next look, it would keep alive what the script has dropped since.
        while not self._stopped.wait(_EVERY):
            self.counts[_look(ident)] += 1

    def __str__(self) -> str:
        total = sum(self.counts.values())
        return ", ".join(f"{what} {count / total:.0%}" for what, count in self.counts.most_common())


def _look(ident: int) -> str:
    """What the thread does; where it waits, another one: the replicas of nn.DataParallel run on threads of theirs."""
    frames = sys._current_frames()
    first = frames.pop(ident, None)
    frames.pop(threading.get_ident(), None)
    return next((what for frame in (first, *frames.values()) if (what := where(frame)) != "elsewhere"), "elsewhere")


_FORWARD = Forward._enter.__code__
_OPTIM = f"torch{os.sep}optim{os.sep}"
_COMPILED = tuple(f"torch{os.sep}{part}{os.sep}" for part in ("_dynamo", "_inductor", "_functorch"))


def where(frame: FrameType | None) -> str:
    """What a thread does: which precision's forward, backward, the optimizer, or something else.

    Args:
        frame: its innermost frame.

    Returns:
        A word or two.
    """
    while frame is not None:
        code = frame.f_code
        if code is _FORWARD:
            region = frame.f_locals.get("region")
            if isinstance(region, Region):
                return f"forward in {name(region.low or torch.float32)}"
        elif code.co_name == "_engine_run_backward":
            return "backward"
        elif _OPTIM in code.co_filename:
            return "optimizer"
        elif any(part in code.co_filename for part in _COMPILED):
            return "compiled forward"
        frame = frame.f_back
    return "elsewhere"
