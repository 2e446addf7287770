"""The command line: `wrapprec COMMAND ...`, or `python -m wrapprec COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from wrapprec import __version__

COMMANDS = {
    "run": ("wrapprec.migrate.run", "run a script unchanged in mixed precision"),
    "migrate": ("wrapprec.migrate.command", "rewrite scripts from torch.amp, Apex amp or plain float32"),
}
"""By name: the module whose `main(arguments)` carries a command out, imported when it is asked for; and its help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry a command out.

    Args:
        arguments: after the name of the program; None takes those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: help was asked for, or there is no such command.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="wrapprec",
        description="Mixed precision for plain PyTorch training loops.",
        epilog=f"commands:\n{lines}\n\n`wrapprec COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(given[:1]).command
    code: int = importlib.import_module(COMMANDS[command][0]).main(given[1:])
    return code
