"""The scripts in the styles that people write, unedited under `wrapprec run`: they train as they did in float32."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rewriting import ARGUMENTS, ENVIRONMENT, LEGACY, OFF, float32_losses, losses, running

from wrapprec.migrate.apex.session import session as apex_session
from wrapprec.migrate.run import Session
from wrapprec.migrate.script import Program, execute

AUTOCAST = "the script calls it under torch.autocast: its precision is the script's own"

# By name: what is said at the time, and how many models are wrapped, by us or by Apex's API.
OUTCOMES: dict[str, tuple[str, int]] = {
    "accumulate": (AUTOCAST, 0),
    "apexclassifier": ("wrapprec.migrate.apex stands in", 1),
    "apexgan": ("wrapprec.migrate.apex stands in", 1),  # two models in one call
    "bfloat": (AUTOCAST, 0),
    "clipwrong": (AUTOCAST, 0),
    "dcgan": ("", 2),
    "decorator": ("", 1),
    "fork": ("", 1),
    "halves": ("its parameters are float16, and no optimizer has them", 0),
    "imagenet": ("", 1),
    "mixed": (AUTOCAST, 0),
    "nanogpt": (AUTOCAST, 0),
    "plain": ("", 1),
    "references": ("", 1),
    "scheduler": (AUTOCAST, 0),
    "trainer": (AUTOCAST, 0),
    "twoscalers": (AUTOCAST, 0),
}

CASES = [(name, True) for name in OUTCOMES] + [(name, False) for name in (*ARGUMENTS, *OFF)]
"""Each with its own mixed precision, and those that have a flag for it also without."""


@pytest.fixture
def _as_a_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    apex_session.calls, apex_session.enabled = [], None
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]
    apex_session.calls, apex_session.enabled = [], None


def _run(
    path: Path, policy: str, arguments: list[str], environment: dict[str, str], patch: pytest.MonkeyPatch
) -> tuple[list[float], list[str], list[str]]:
    """The script's losses, what was said meanwhile, and the lines of the summary about models."""
    printed, said = io.StringIO(), list[str]()
    session = Session(policy, False, said.append)
    with running(arguments, environment, patch), contextlib.redirect_stdout(printed):
        session.start()
        try:
            execute(*Program(str(path), False, tuple(arguments)).load())
        finally:
            session.stop()
    numbers = [float(number) for number in re.findall(r"loss (-?[\d.]+|nan|inf)", printed.getvalue())]
    return numbers, said, [line for line in session.summary().splitlines() if line.startswith("wrapped")]


def test_every_script_is_in_the_table() -> None:
    assert set(OUTCOMES) == {path.stem for path in LEGACY.glob("*.py")}


def _scale_low(patch: pytest.MonkeyPatch) -> None:
    """Have the scalers of scripts start lower: at 2**16 they skip the first steps, which is another curve."""
    plain = torch.amp.GradScaler.__init__

    def lower(self: torch.amp.GradScaler, device: str = "cuda", init_scale: float = 256.0, **rest: object) -> None:
        plain(self, device, init_scale, **rest)  # type: ignore[arg-type]

    patch.setattr(torch.amp.GradScaler, "__init__", lower)


# At the first scale of 2**16 early steps may overflow and are skipped, as with GradScaler: another curve.
@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed,init_scale=256"])
@pytest.mark.parametrize(("name", "is_on"), CASES)
def test_script_trains_to_the_curve_of_float32(
    name: str, is_on: bool, policy: str, monkeypatch: pytest.MonkeyPatch, _as_a_process: None
) -> None:
    path = LEGACY / f"{name}.py"
    _scale_low(monkeypatch)
    want = float32_losses(path, monkeypatch)
    environment = (ENVIRONMENT if is_on else OFF).get(name, {})
    got, said, wrapped = _run(path, policy, ARGUMENTS.get(name, []) if is_on else [], environment, monkeypatch)
    assert len(got) == len(want) >= 7
    # bfloat16 keeps 8 bits: 0.4% an operation, and a few operations and steps one after another.
    assert got == pytest.approx(want, rel=0.04, abs=0.02)
    part, number = OUTCOMES[name] if is_on else ("", 1)
    assert all(part in line for line in said[:1]) and len(wrapped) == number
    if number:
        assert got != want, "nothing was rounded"
    else:
        assert said and all(line.startswith("left ") for line in said)
        assert got == losses(path.read_text("utf-8"), [], environment, monkeypatch), "it was not left alone"
