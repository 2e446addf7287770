"""Scripts in the styles that people write: what the rewriter makes of each, byte for byte, and how both train."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest
import torch
from rewriting import LEGACY, losses, rewritten

import wrapprec.migrate.rewrite.facts as facts

SCRIPTS = sorted(LEGACY.glob("*.py"))
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)

ARGUMENTS = {"imagenet": ["--amp"], "references": ["--amp"], "fork": ["--fp16"]}
"""What switches mixed precision on, where a script has a flag for it."""
ENVIRONMENT = {"nanogpt": {"DTYPE": "bfloat16"}}
OFF = {"nanogpt": {"DTYPE": "float32"}}


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
    code, _ = rewritten(before)
    tree = ast.parse(code)
    kept = {"decorator"}  # has an island of float32 inside its model, which autocast itself may say
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not (names | imported) & {"GradScaler", "amp", "scaler", "ctx", "master_params"}
    assert path.stem in kept or not (names | imported) & {"autocast"}
    lost = set(_comments(before)) - set(_comments(code))
    # Two sides of an `if` that say the same become one, and the loops over float32 copies go, with what is in them.
    assert not lost, lost


@every_script
def test_a_script_has_one_line_more_for_each_wrap_and_the_import_apart_from_what_went(path: Path) -> None:
    before = path.read_text("utf-8").splitlines()
    code, _ = rewritten(path.read_text("utf-8"))
    words = {word for line in before for word in line.split()}
    new = [line for line in code.splitlines() if line.strip() and line not in before]
    for line in new:
        known = all(word in words for word in line.split())
        short = any(one in line for one in ("wrapprec", ".step(", "backward()", "handle", "import", "no_grad"))
        assert known or short or line.strip().rstrip(",)") in code and "wrap(" in code, line


def _float32(path: Path, patch: pytest.MonkeyPatch) -> list[float]:
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


@every_script
def test_a_rewritten_script_trains_to_the_curve_of_float32(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = _float32(path, monkeypatch)
    code, _ = rewritten(path.read_text("utf-8"))
    got = losses(code, ARGUMENTS.get(path.stem, []), ENVIRONMENT.get(path.stem, {}), monkeypatch)
    assert len(got) == len(want) >= 8
    # bfloat16 keeps 8 bits: 0.4% an operation, and a few operations and steps one after another.
    assert got == pytest.approx(want, rel=0.04, abs=0.02)


def test_a_rewritten_script_is_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves above would also agree if nothing were wrapped."""
    wrapped = {}
    for path in SCRIPTS:
        code, _ = rewritten(path.read_text("utf-8"))
        seen: list[str] = []
        import wrapprec

        real = wrapprec.wrap

        def spy(*args: object, seen: list[str] = seen, real: object = real, **keywords: object) -> object:
            handle = real(*args, **keywords)  # type: ignore[operator]
            seen.extend(str(plan.policy) for plan in handle.plans)
            return handle

        with monkeypatch.context() as inner:
            inner.setattr(wrapprec, "wrap", spy)
            losses(code, ARGUMENTS.get(path.stem, []), {"STEPS": "1", **ENVIRONMENT.get(path.stem, {})}, monkeypatch)
        wrapped[path.stem] = seen
    low = {name for name, policies in wrapped.items() if policies and all("16" in policy for policy in policies)}
    assert low == set(wrapped) - {"plain"}
    assert len(wrapped["plain"]) == 1
    assert len(wrapped["dcgan"]) == len(wrapped["apexgan"]) == len(wrapped["twoscalers"]) == 2


@pytest.mark.parametrize("name", ["imagenet", "references", "fork"])
def test_a_flag_that_switched_mixed_precision_still_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = LEGACY / f"{name}.py"
    code, _ = rewritten(path.read_text("utf-8"))
    assert losses(code, [], {}, monkeypatch) == losses(path.read_text("utf-8"), [], {}, monkeypatch)


def test_autocast_has_the_default_dtypes_that_the_rewriter_thinks() -> None:
    for device in ("cuda", "cpu", "mps", "xpu", "hpu", "xla"):
        preset = '"bf16-mixed"' if torch.get_autocast_dtype(device) is torch.bfloat16 else '"16-mixed"'
        assert facts.DEVICES.get(device, '"16-mixed"') == preset
