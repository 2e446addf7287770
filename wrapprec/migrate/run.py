"""`wrapprec run`: a script unchanged, in mixed precision."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from wrapprec.errors import PolicyError, WrapprecError
from wrapprec.migrate.alias import ApexFinder
from wrapprec.migrate.clock import Clock
from wrapprec.migrate.find import Finder
from wrapprec.migrate.outcome import tell
from wrapprec.migrate.recorders import Recorders
from wrapprec.migrate.script import Program, execute
from wrapprec.policy import Policy

_ENOUGH = 20
"""Looks at the clock, of a hundredth of a second each, that make a share worth telling."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wrapprec run",
        description="Run a script as `python script.py` would, with every model that it trains wrapped at its first"
        " training forward. What was wrapped, and what was left alone and why, is said on stderr.",
    )
    parser.add_argument("--policy", default="auto", help="e.g. bf16-mixed or 16-mixed; by device unless it is given")
    parser.add_argument("--dry-run", action="store_true", help="print the plan at the first training forward, and stop")
    parser.add_argument("-m", dest="module", action="store_true", help="the target is a module, as after python -m")
    parser.add_argument("target", help="a script, - for stdin, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script gets")
    return parser


class Session:
    """What is set up around a script, in each process that trains.

    Args:
        policy: for `wrap`.
        dry_run: print the plan at the first training forward, and end the script.
        say: takes what is to be said.
    """

    def __init__(self, policy: str, dry_run: bool, say: Callable[[str], None]) -> None:
        self.policy, self.dry_run = policy, dry_run
        self.finder = Finder(policy, say, dry_run)
        self.clock = Clock()
        self.alias = ApexFinder(say)
        self.recorders = Recorders(self.finder.models)
        self.finder.when_wrapped = self.clock.start
        self._starts: list[tuple[Any, Any]] = []
        self._has_children = False

    def start(self) -> None:
        """Watch what is built and called from now on."""
        self.finder.install()
        self.alias.install()
        self.recorders.install()
        for module in _spawning():
            start = module.start_processes
            self._starts.append((module, start))
            module.start_processes = self._passing_on(start)

    def stop(self) -> None:
        """Watch no more; what is wrapped stays wrapped."""
        self.finder.remove()
        self.alias.remove()
        self.recorders.remove()
        self.clock.stop()
        while self._starts:
            module, start = self._starts.pop()
            module.start_processes = start

    def _passing_on(self, start: Callable[..., Any]) -> Callable[..., Any]:
        """Have the processes that torch.multiprocessing starts find their models, too."""

        def start_processes(fn: Any, *args: Any, **kwargs: Any) -> Any:
            self._has_children = True
            return start(_Child(fn, self.policy, self.dry_run), *args, **kwargs)

        return start_processes

    def summary(self) -> str:
        """What was wrapped, and what came of it."""
        lines = tell(self.finder.found)
        if lines and sum(self.clock.counts.values()) >= _ENOUGH:
            lines.append(f"time since then: {self.clock}")
        if not lines and not self.finder.found and not self._has_children:  # they say so themselves
            lines = ["no training forward of a model with a torch optimizer was seen: nothing was wrapped"]
        return "\n".join(lines)


class _Child:
    """A function that another process runs, with what this one has around the script."""

    def __init__(self, function: Any, policy: str, dry_run: bool) -> None:
        self._function, self._policy, self._dry_run = function, policy, dry_run
        self.__name__ = getattr(function, "__name__", "function")

    def __call__(self, rank: int, *args: Any) -> Any:
        session = Session(self._policy, self._dry_run, say if rank == 0 else _nothing)
        session.start()
        out = self._function(rank, *args)
        session.stop()
        if rank == 0:
            say(session.summary())
        return out


def _nothing(text: str) -> None:
    pass


def _spawning() -> list[Any]:
    import torch.multiprocessing

    return [torch.multiprocessing, sys.modules["torch.multiprocessing.spawn"]]


def say(text: str) -> None:
    """Write a line to stderr, or several; not on the other ranks of a launcher.

    Args:
        text: without the name of the program.
    """
    if os.environ.get("RANK", "0") == "0":
        for line in text.splitlines():
            print(f"wrapprec: {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script.

    Args:
        arguments: after `run`; None takes those of the process.

    Returns:
        2 where the policy cannot be read or the script not be found; 0 where it came to its end.

    Raises:
        BaseException: whatever the script raises, `SystemExit` included.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.policy != "auto":
            Policy.parse(options.policy)
    except PolicyError as error:
        parser.error(str(error))
    program = Program(options.target, options.module, tuple(options.arguments))
    session, process = Session(options.policy, options.dry_run, say), os.getpid()
    session.start()
    try:
        code, main_module = program.load()
    except WrapprecError as error:
        session.stop()
        parser.error(str(error))

    def report() -> None:
        if os.getpid() == process and not (options.dry_run and session.finder.found):
            session.clock.stop()
            say(session.summary())

    atexit.register(report)
    execute(code, main_module)
    return 0
