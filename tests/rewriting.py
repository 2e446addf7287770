"""What the tests of the rewriter share: rewriting a text, and running one."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wrapprec.migrate.rewrite.source import Result, rewrite
from wrapprec.migrate.rewrite.syntax import cst

LEGACY = Path(__file__).parent / "legacy"

ARGUMENTS = {"imagenet": ["--amp"], "references": ["--amp"], "fork": ["--fp16"]}
"""What switches mixed precision on, where a script has a flag for it."""
ENVIRONMENT = {"nanogpt": {"DTYPE": "bfloat16"}}
OFF = {"nanogpt": {"DTYPE": "float32"}}


def rewritten(source: str, policy: str = "auto") -> tuple[str, Result]:
    """A text as the rewriter leaves it, and what it says; it must be stable under another run."""
    result = rewrite(cst.parse_module(source), policy)
    code = result.module.code
    again = rewrite(cst.parse_module(code), policy)
    assert not again.changed, "rewriting again changes more"
    return code, result


def becomes(before: str, after: str) -> Result:
    """A text becomes exactly another one, wholly."""
    code, result = rewritten(textwrap.dedent(before).lstrip("\n"))
    assert code == textwrap.dedent(after).lstrip("\n")
    assert not result.left
    return result


def stays(source: str, *reasons: tuple[int, str]) -> None:
    """A text stays as it is, with reasons: the line and a part of the words."""
    text = textwrap.dedent(source).lstrip("\n")
    code, result = rewritten(text)
    assert code == text and not result.changed
    got = [(one.line, one.words) for one in result.left]
    assert len(got) == len(reasons), got
    for (line, words), (wanted, part) in zip(got, reasons, strict=True):
        assert line == wanted and part in words, got


@contextlib.contextmanager
def running(arguments: list[str], environment: dict[str, str], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a script runs: its own arguments, and warnings that do not stop it."""
    with patch.context() as inner, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner.setattr(sys, "argv", ["script.py", *arguments])
        for name, value in environment.items():
            inner.setenv(name, value)
        yield


def losses(source: str, arguments: list[str], environment: dict[str, str], patch: pytest.MonkeyPatch) -> list[float]:
    """Run a script in this process; gives the numbers behind `loss` that it prints."""
    printed = io.StringIO()
    names = types.ModuleType("__main__").__dict__
    with running(arguments, environment, patch), contextlib.redirect_stdout(printed):
        exec(compile(source, "script.py", "exec"), names)
    return [float(number) for number in re.findall(r"loss (-?[\d.]+|nan|inf)", printed.getvalue())]


def float32_losses(path: Path, patch: pytest.MonkeyPatch) -> list[float]:
    """The script's own curve in float32: with its flag off, or with autocast and scaler switched off inside."""
    source = path.read_text("utf-8")
    if path.stem.startswith("apex"):  # without Apex, which has no CPU form: its lines by hand
        source = (LEGACY / "migrated" / path.name).read_text("utf-8").replace("wrapprec.wrap(", "wrapprec.wrap(*")
        source = source.replace("wrap(*model, optimizer, args.opt_level", 'wrap(model, optimizer, "32-true"')
        source = source.replace('wrap(*[netD, netG], [optimizerD, optimizerG], "O1"', "wrap([netD, netG]")
        source = source.replace("wrap([netD, netG]", 'wrap([netD, netG], policy="32-true"')
    if path.stem == "halves":
        source = source.replace("half()", "float()")
    plain = torch.amp.autocast_mode.autocast.__init__

    def off(self: torch.autocast, device_type: str, dtype: object = None, enabled: bool = True, **rest: object) -> None:
        plain(self, device_type, enabled=False)

    with patch.context() as inner:
        inner.setattr(torch.amp.autocast_mode.autocast, "__init__", off)
        inner.setattr(torch.amp.GradScaler, "is_enabled", lambda self: False)
        return losses(source, [], OFF.get(path.stem, {}), patch)
