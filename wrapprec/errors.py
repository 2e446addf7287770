"""Every exception of wrapprec, and how an error names a module."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WrapprecError(Exception):
    """The parent of everything wrapprec raises on purpose."""


class PolicyError(WrapprecError, ValueError):
    """A policy, rule, loss scale or plan that cannot be understood or cannot work."""


class AlreadyWrappedError(WrapprecError, RuntimeError):
    """The model or the optimizer is wrapped already."""


class NotWrappedError(WrapprecError, RuntimeError):
    """The model is not wrapped, or no longer."""


class ModelChangedError(WrapprecError, RuntimeError):
    """Parameters or modules changed after `wrap` in a way that cannot be taken up."""


class DtypeMismatchError(WrapprecError, RuntimeError):
    """An operation inside a wrapped model met dtypes that do not go together."""


class ScaleLeakError(WrapprecError, RuntimeError):
    """A tensor crossed the border of the loss scale unseen; its gradient would be wrong by that factor."""


class CaptureError(WrapprecError, AttributeError, RuntimeError):
    """A wrapped model was given to what records graphs (torch.export, torch.jit), and the graph would be wrong.

    An AttributeError, too: to torch.jit.script it says that the forward lacks what scripting looks for.
    """


class NonFiniteError(WrapprecError, FloatingPointError):
    """The loss scale cannot help any more: gradients stay inf or nan."""


class StepError(WrapprecError, RuntimeError):
    """An optimizer step that cannot be decided or carried out."""


class WrapprecWarning(UserWarning):
    """Something works, but probably not as meant."""


def message(expected: str, received: str, *, where: str | None = None, remedy: str) -> str:
    """Build the four-part text that every error of wrapprec carries.

    Args:
        expected: what would have been right, without a full stop.
        received: what came instead.
        where: the qualified name of the module or parameter; None where there is none.
        remedy: what to do about it.

    Returns:
        One line a part; the `Where` line is left out when `where` is None.

    >>> print(message("a dtype name", "'floaty'", remedy="write float32"))
    Expected a dtype name.
    Received: 'floaty'
    Remedy: write float32
    """
    lines = [f"Expected {expected.rstrip('.')}.", f"Received: {received}"]
    if where is not None:
        lines.append(f"Where: {where}")
    lines.append(f"Remedy: {remedy}")
    return "\n".join(lines)


def module_label(fqn: str, module: object) -> str:
    """Name a module the way every message does.

    Args:
        fqn: the qualified name; the empty string is the model itself.
        module: the module, of which only the class name is used.

    Returns:
        The quoted name and the class.

    >>> from torch import nn
    >>> module_label("decoder.norm", nn.LayerNorm(4))
    '"decoder.norm" (LayerNorm)'
    >>> module_label("", nn.Sequential())
    '"" (the model itself, Sequential)'
    """
    kind = type(module).__name__
    return f'"{fqn}" ({kind})' if fqn else f'"" (the model itself, {kind})'


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant, as the start of a remedy.

    Args:
        word: what was written.
        known: what could have been written.

    Returns:
        `did you mean 'x'? ` with its trailing space, or the empty string when nothing is near.

    >>> nearest("bf16-mixd", ["bf16-mixed", "32-true"])
    "did you mean 'bf16-mixed'? "
    >>> nearest("zzz", ["bf16-mixed"])
    ''
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}? " if found else ""
