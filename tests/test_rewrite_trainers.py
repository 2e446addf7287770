"""A repository whose loop is in one file, and whose model and optimizer are made in another: looked at together."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from wrapprec.cli import main

ENGINE = """
import torch

def fit(net, batches, opt, penalty=0.0):
    net.train()
    for x, y in batches:
        loss = (net(x) - y).square().mean() + penalty * net.weight.square().sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        print(f"loss {loss.item():.6f}")
"""
MAIN = """
import torch
from engine import fit

def start(lr):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x = torch.randn(12, 16, 8)
    fit(model, [(one, one[:, :2]) for one in x], optimizer, penalty=0.01)

if __name__ == "__main__":
    start(0.1)
"""
LINE = '    wrapprec.wrap(model, optimizer, "bf16-mixed")\n'


def _migrate(*arguments: object) -> int:
    return main(["migrate", "--policy", "bf16-mixed", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "engine.py").write_text(ENGINE)
    (tmp_path / "start.py").write_text(MAIN)
    return tmp_path


def _losses(folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[float]:
    patch.syspath_prepend(str(folder))
    patch.delitem(sys.modules, "engine", raising=False)
    capsys.readouterr()
    runpy.run_path(str(folder / "start.py"), run_name="__main__")
    patch.delitem(sys.modules, "engine", raising=False)
    return [float(one) for one in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]


def test_the_file_that_makes_model_and_optimizer_gets_the_line_and_trains(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = _losses(folder, monkeypatch, capsys)
    assert _migrate("--check", folder) == 1, "there is something to do"
    assert _migrate("--write", folder) == 0
    assert (folder / "engine.py").read_text() == ENGINE
    made = "    optimizer = torch.optim.SGD(model.parameters(), lr=lr)\n"
    after = MAIN.replace("import torch\n", "import torch\nimport wrapprec\n").replace(made, made + LINE)
    assert (folder / "start.py").read_text() == after
    got = _losses(folder, monkeypatch, capsys)
    # bfloat16 keeps 8 bits: 0.4% an operation, a few of them one after another.
    assert len(want) == 12 and got == pytest.approx(want, rel=0.03) and got != want


def test_a_repository_that_is_migrated_is_clean(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _migrate("--write", folder)
    capsys.readouterr()
    assert _migrate("--check", folder) == 0
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_a_loop_whose_callers_are_not_given_is_reported_still(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _migrate("--write", folder)
    assert _migrate("--check", folder / "engine.py") == 1
    assert "engine.py:9: left: which model and optimizer this loop trains" in capsys.readouterr().err


def test_one_caller_that_does_not_wrap_keeps_the_loop_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _migrate("--write", folder)
    (folder / "other.py").write_text("from engine import fit\nfrom made import pair\nfit(pair[0], [], pair[1])\n")
    assert _migrate("--check", folder) == 1
    assert "engine.py:9: left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "engine",
    [
        ENGINE.replace("        loss =", "        with torch.autocast('cuda'):\n            pass\n        loss ="),
        ENGINE.replace("    net.train()", "    net.half()"),
        ENGINE.replace("    net.train()", "    opt = torch.optim.SGD(net.parameters())"),
        ENGINE.replace("opt.step()", "pass"),
        "import wrapprec\n" + ENGINE.replace("    net.train()", "    wrapprec.wrap(net, opt)"),
    ],
    ids=["autocast", "half", "another optimizer", "no step", "wrapped there"],
)
def test_a_loop_that_does_more_than_train_its_arguments_brings_no_line(folder: Path, engine: str) -> None:
    (folder / "engine.py").write_text(engine)
    _migrate("--write", folder)
    assert (folder / "start.py").read_text() == MAIN


@pytest.mark.parametrize(
    ("where", "spelled", "call"),
    [
        ("engine.py", "import engine", "engine.fit("),
        ("lib/engine.py", "from lib.engine import fit", "fit("),
        ("lib/engine.py", "import lib.engine as e", "e.fit("),
        ("engine.py", "from .engine import fit as run", "run("),
    ],
)
def test_an_import_is_followed_as_it_is_written(folder: Path, where: str, spelled: str, call: str) -> None:
    (folder / "lib").mkdir()
    (folder / "engine.py").rename(folder / where)
    (folder / "start.py").write_text(MAIN.replace("from engine import fit", spelled).replace(" fit(", f" {call}"))
    _migrate("--write", folder)
    assert LINE in (folder / "start.py").read_text()


def test_a_function_of_the_same_name_in_another_file_is_not_meant(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "engine.py").write_text(ENGINE)
    (folder / "engine.py").unlink()
    _migrate("--write", folder)
    assert (folder / "start.py").read_text() == MAIN


def test_an_optimizer_that_a_models_own_method_makes_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = """
        import torch

        class Trainer:
            def __init__(self, model, batches):
                self.model = model
                self.optimizer = None
                self.batches = batches

            def run(self):
                self.optimizer = self.model.configure_optimizers(0.1)
                for x in self.batches:
                    self.model.zero_grad()
                    self.model(x).sum().backward()
                    self.optimizer.step()
    """
    (tmp_path / "trainer.py").write_text(source.replace("\n        ", "\n"))
    assert _migrate("--check", tmp_path) == 1
    assert "`run` may run more than once for the model `model`" in capsys.readouterr().err


HELPER = """
import torch

class LossScaler:
    def __init__(self):
        self._scaler = torch.amp.GradScaler("cpu")

    def __call__(self, loss, optimizer, clip, parameters):
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        self._scaler.step(optimizer)
        self._scaler.update()
        return norm
"""
SCALED = """
import torch

def fit(net, batches, opt, scaler):
    for x, y in batches:
        with torch.autocast("cpu"):
            loss = (net(x) - y).square().mean()
        opt.zero_grad()
        norm = scaler(loss, opt, clip=0.5, parameters=net.parameters())
        print(f"loss {loss.item():.6f} and loss {norm.item():.6f}")
"""


def _with_helper(folder: Path) -> None:
    (folder / "helper.py").write_text(HELPER)
    (folder / "engine.py").write_text(SCALED)
    main_file = MAIN.replace("from engine", "from helper import LossScaler\nfrom engine").replace(
        "penalty=0.01", "scaler"
    )
    (folder / "start.py").write_text(main_file.replace("    x =", "    scaler = LossScaler()\n    x ="))


def test_a_scaler_in_a_helper_of_another_file_is_left_with_what_to_do_in_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_helper(folder)
    before = {path: path.read_bytes() for path in folder.glob("*.py")}
    assert _migrate("--check", "--write", folder) == 1
    said = capsys.readouterr().err
    assert "engine.py:4: left: `net` comes from outside of this file: call wrapprec.wrap where it is made, and" in said
    assert (
        "helper.py:6: left: there is no autocast that goes with this scaler in this file: give it enabled=False" in said
    )
    assert before == {path: path.read_bytes() for path in folder.glob("*.py")}


def test_what_is_said_of_a_helper_is_right_when_done_by_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_helper(folder)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    off = SCALED.replace('autocast("cpu")', 'autocast("cpu", enabled=False)')
    (folder / "engine.py").write_text(off)
    (folder / "helper.py").write_text(HELPER.replace('"cpu"', '"cpu", enabled=False'))
    want = _losses(folder, monkeypatch, capsys)
    (folder / "engine.py").write_text(off.replace('with torch.autocast("cpu", enabled=False):', "if True:"))
    made, line = "    scaler = LossScaler()\n", LINE.replace('"bf16-mixed"', '"16-mixed", loss_scale=64.0')
    start = (folder / "start.py").read_text().replace("import torch\n", "import torch, wrapprec\n")
    (folder / "start.py").write_text(start.replace(made, line + made))
    got = _losses(folder, monkeypatch, capsys)
    # float16 keeps 11 bits: 0.05% an operation, and 12 steps one after another; also of the norms, which are true.
    assert len(want) == 24 and got == pytest.approx(want, rel=0.01) and got != want
