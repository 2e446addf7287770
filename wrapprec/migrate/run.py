"""`wrapprec run`: a script unchanged, in mixed precision."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Sequence

from wrapprec.errors import PolicyError, WrapprecError
from wrapprec.migrate.alias import ApexFinder
from wrapprec.migrate.children import Children
from wrapprec.migrate.clock import Clock
from wrapprec.migrate.find import Finder
from wrapprec.migrate.frames import Frames
from wrapprec.migrate.outcome import tell
from wrapprec.migrate.recorders import Recorders
from wrapprec.migrate.saving import Saving
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
        self._speak, self._prefix, self._before = say, "", 0
        self.finder = Finder(policy, self.say, dry_run)
        self.clock = Clock()
        self.alias = ApexFinder(self.say)
        self.recorders = Recorders(self.finder.models)
        self.saving = Saving()
        self.frames = Frames()
        self.finder.when_wrapped = lambda: self.clock.start()
        self.children = Children(begin, (policy, dry_run), self._forked, self._ended)

    def start(self) -> None:
        """Watch what is built and called from now on."""
        self.finder.install()
        self.alias.install()
        self.recorders.install()
        self.saving.install()
        self.frames.install()
        self.children.install()

    def stop(self) -> None:
        """Watch no more; what is wrapped stays wrapped."""
        self.finder.remove()
        self.alias.remove()
        self.recorders.remove()
        self.saving.remove()
        self.frames.remove()
        self.children.remove()
        self.clock.stop()

    def say(self, text: str) -> None:
        """Say it, under the name of this process where it has one.

        Args:
            text: one line or several.
        """
        if text:
            self._speak("\n".join(self._prefix + line for line in text.splitlines()))

    def _forked(self, prefix: str | None) -> None:
        """This is another process now: what was wrapped before, and the clock, are those of its parent."""
        self._speak, self._prefix = (_nothing, "") if prefix is None else (say, prefix)
        self._before = len(self.finder.found)
        self.finder.prints = prefix is not None
        self.clock = Clock()

    def _ended(self) -> None:
        self.clock.stop()
        if len(self.finder.found) > self._before and not self.dry_run:
            self.say(self.summary())

    def summary(self) -> str:
        """What was wrapped in this process, and what came of it."""
        found = self.finder.found[self._before :]
        lines = tell(found)
        if lines and sum(self.clock.counts.values()) >= _ENOUGH:
            lines.append(f"time since then: {self.clock}")
        if not lines and not found and not self.children.ranked:  # the ranks say so themselves
            where = " in this process" * self.children.started
            lines = [f"no training forward of a model with a torch optimizer was seen{where}: nothing was wrapped"]
        return "\n".join(lines)


def begin(policy: str, dry_run: bool) -> Children:
    """Watch, in a process that was spawned.

    Args:
        policy: of the `Session`.
        dry_run: of the `Session`.

    Returns:
        What watches over the processes that this one starts.
    """
    session = Session(policy, dry_run, say)
    _sessions.append(session)
    session.start()
    return session.children


_sessions: list[Session] = []
"""Keeps that of a spawned process alive."""


def _nothing(text: str) -> None:
    pass


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
