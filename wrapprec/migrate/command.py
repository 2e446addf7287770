"""`python -m wrapprec migrate`: rewrite scripts and notebooks, print the difference, say what was left and why."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wrapprec.errors import PolicyError, WrapprecError
from wrapprec.policy import Policy

DESCRIPTION = "Rewrite training scripts from torch.amp, Apex amp or plain float32 to wrapprec; they are never run."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="wrapprec migrate", description=DESCRIPTION)
    made.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a .py or .ipynb file, or a folder of them")
    made.add_argument("--write", action="store_true", help="edit the files; without it the difference is printed")
    made.add_argument("--check", action="store_true", help="exit with 1 if anything is left to do")
    made.add_argument("--policy", default="auto", help="for loops that had no mixed precision (default: auto)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line, without the program's name.

    Returns:
        0, 1 with `--check` where anything is left to do, or 2 where a file cannot be taken; nothing is written then.
    """
    options = parser().parse_args(arguments)
    try:
        _check_policy(options.policy)
        return _migrate(options)
    except WrapprecError as error:
        print(error, file=sys.stderr)
        return 2


def _check_policy(policy: str) -> None:
    if policy != "auto":
        Policy.parse(policy)
    if '"' in policy or "\\" in policy:
        raise PolicyError(f"Expected a policy without quotes.\nReceived: {policy}\nRemedy: name a preset")


def _migrate(options: argparse.Namespace) -> int:
    from wrapprec.migrate.rewrite.files import collect, look_all, write

    outcomes = look_all(collect(options.paths, options.write), options.policy)
    for outcome in outcomes:
        if outcome.result.changed and options.write:
            write(outcome)
            print(f"{outcome.path}: rewritten", file=sys.stderr)
        elif outcome.result.changed:
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
            sys.stdout.write(outcome.diff())
        for kind, remarks in (("left", outcome.result.left), ("note", outcome.result.notes)):
            for remark in remarks:
                print(f"{outcome.path}:{remark.line}: {kind}: {remark.words}", file=sys.stderr)
    undone = any(one.result.left or (one.result.changed and not options.write) for one in outcomes)
    return 1 if options.check and undone else 0
