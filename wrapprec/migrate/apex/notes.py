"""What the shim says: one line on stderr, once in a process and on the first rank; and names that it refuses."""

from __future__ import annotations

import sys
from typing import Any

import torch

from wrapprec.errors import WrapprecError, message

_said: set[str] = set()


def note(text: str) -> None:
    """Say something on stderr, unless it was said before or another rank says it.

    Args:
        text: one line, or several.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if text in _said or (distributed and torch.distributed.get_rank() > 0):
        return
    _said.add(text)
    print(f"wrapprec: {text}", file=sys.stderr)


def refuse(name: str, received: str, remedy: str) -> WrapprecError:
    """Build the error for something of Apex that has no counterpart.

    Args:
        name: which part of Apex, e.g. `optimizers.FusedAdam`.
        received: what was asked of it.
        remedy: what to do instead.

    Returns:
        The error, to be raised.
    """
    return WrapprecError(message(f"a use of apex.{name} that torch has a counterpart for", received, remedy=remedy))


def refused(name: str, remedy: str) -> Any:
    """Make a class that can be imported under a name of Apex, and that raises when it is used.

    Args:
        name: which part of Apex, e.g. `fp16_utils.FP16_Optimizer`.
        remedy: what to do instead.

    Returns:
        The class.

    >>> refused("parallel.Reducer", "use DistributedDataParallel")()
    Traceback (most recent call last):
    wrapprec.errors.WrapprecError: Expected a use of apex.parallel.Reducer that torch has a counterpart for.
    Received: a call of it
    Remedy: use DistributedDataParallel
    """

    def __init__(self: object, *args: object, **kwargs: object) -> None:
        raise refuse(name, "a call of it", remedy)

    return type(name.rpartition(".")[2], (), {"__init__": __init__, "__doc__": f"Refused: {remedy}."})
