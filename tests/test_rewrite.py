"""Scripts in the styles that people write: what the rewriter makes of each, byte for byte, and how both train."""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch
from rewriting import ARGUMENTS, ENVIRONMENT, LEGACY, float32_losses, losses, rewritten

import wrapprec
import wrapprec.migrate.rewrite.facts as facts

SCRIPTS = sorted(LEGACY.glob("*.py"))
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def _comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


@every_script
def test_a_script_becomes_what_is_kept_beside_it(path: Path) -> None:
    code, result = rewritten(path.read_text("utf-8"))
    assert code == (LEGACY / "migrated" / path.name).read_text("utf-8")
    assert not result.left


@every_script
def test_nothing_of_the_old_ways_is_left_and_every_comment_is(path: Path) -> None:
    before = path.read_text("utf-8")
    code = _rewritten(path)
    tree = ast.parse(code)
    kept = {"decorator"}  # has an island of float32 inside its model, which autocast itself may say
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not (names | imported) & {"GradScaler", "amp", "scaler", "ctx", "master_params"}
    assert path.stem in kept or not (names | imported) & {"autocast"}
    lost = set(_comments(before)) - set(_comments(code))
    assert not lost, lost


@functools.cache
def _rewritten(path: Path) -> str:
    return rewritten(path.read_text("utf-8"))[0]


@every_script
def test_a_rewritten_script_trains_in_mixed_precision_to_the_curve_of_float32(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = float32_losses(path, monkeypatch)
    policies: list[str] = []
    real = wrapprec.wrap

    def settled(*args: Any, **keywords: Any) -> wrapprec.Handle:
        # At the first scale of 2**16 early steps overflow and are skipped, as with GradScaler: another curve.
        handle = real(*args, **keywords)
        policies.extend(str(plan.policy) for plan in handle.plans)
        if handle.plans and "16-mixed" in policies[-1] and "loss_scale" not in keywords:
            handle.unwrap()
            handle = real(*args, **keywords, loss_scale=256.0)
        return handle

    with monkeypatch.context() as inner:
        inner.setattr(wrapprec, "wrap", settled)
        code = _rewritten(path)
        got = losses(code, ARGUMENTS.get(path.stem, []), ENVIRONMENT.get(path.stem, {}), monkeypatch)
    assert len(got) == len(want) >= 7
    # bfloat16 keeps 8 bits: 0.4% an operation, and a few operations and steps one after another.
    assert got == pytest.approx(want, rel=0.04, abs=0.02)
    assert len(policies) == (2 if path.stem in ("dcgan", "apexgan", "twoscalers") else 1)
    assert path.stem == "plain" or all("16" in policy for policy in policies)  # what `auto` is depends on the CPU


@pytest.mark.parametrize("name", ["imagenet", "references", "fork"])
def test_a_flag_that_switched_mixed_precision_still_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = LEGACY / f"{name}.py"
    code = _rewritten(path)
    assert losses(code, [], {}, monkeypatch) == losses(path.read_text("utf-8"), [], {}, monkeypatch)


def test_a_scheduler_that_waits_for_skipped_steps_still_does(monkeypatch: pytest.MonkeyPatch) -> None:
    path = LEGACY / "scheduler.py"
    high = path.read_text("utf-8").replace("2.0**8", "2.0**18")  # overflows a few times
    want = losses(high, [], {"STEPS": "10"}, monkeypatch)
    got = losses(_rewritten(path).replace("2.0**8", "2.0**18"), [], {"STEPS": "10"}, monkeypatch)
    assert want[0] != want[1] and len(got) == 10
    # float16 keeps 11 bits; GradScaler and wrapprec skip the same steps, or the curves would part at once.
    assert got == pytest.approx(want, rel=0.01)


def test_autocast_has_the_default_dtypes_that_the_rewriter_thinks() -> None:
    for device in ("cuda", "cpu", "mps", "xpu", "hpu", "xla"):
        preset = '"bf16-mixed"' if torch.get_autocast_dtype(device) is torch.bfloat16 else '"16-mixed"'
        assert facts.DEVICES.get(device, '"16-mixed"') == preset
