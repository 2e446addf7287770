"""What belongs together across functions, classes and time is rewritten together, or stays."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from rewriting import becomes, rewritten, stays

from wrapprec.migrate.command import main
from wrapprec.migrate.rewrite import files
from wrapprec.migrate.rewrite.notebook import rewrite_notebook

HEAD = """import torch
from torch.cuda.amp import GradScaler, autocast
"""
MADE = """model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
STEP = """with autocast():
    loss = model(x).mean()
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()
"""


def _in(head: str, code: str) -> str:
    return f"{head}\n" + "".join(f"    {line}\n" for line in code.splitlines())


def test_a_scaler_that_a_function_makes_keeps_the_loop_that_uses_it() -> None:
    helper = _in("def forward(model):", "with autocast():\n    return model(x).mean()")
    loop = _in("for x in loader:", "loss = forward(model)\nscaler.scale(loss).backward()\nscaler.step(optimizer)")
    made = "def make():\n    return GradScaler()\n"
    stays(
        HEAD + made + helper + MADE + "scaler = make()\n" + loop,
        (4, "not held by one variable"),
        (13, "`scaler` scales here"),
    )


@pytest.mark.parametrize(
    ("line", "holder"),
    [
        ("loss_scaler(loss, optimizer, parameters=model.parameters())", "loss_scaler"),
        ("self.scaler.scale(loss).backward()", "self.scaler"),
        ("other.unscale_(optimizer)", "other"),
        ("engine.step(optimizer)", "engine"),
    ],
)
def test_a_scaler_of_another_file_keeps_the_loop(line: str, holder: str) -> None:
    loop = _in("for x in loader:", f"with autocast():\n    loss = model(x).mean()\n{line}")
    stays(HEAD + MADE + loop, (8, f"`{holder}` scales here"))


def test_functional_code_that_stays_under_autocast_keeps_the_scaler_of_its_caller() -> None:
    left = _in("def contrast(a, b):", "with autocast():\n    return (a @ b.t()).mean()")
    loop = _in("for x in loader:", STEP.replace("scaler.scale(loss)", "scaler.scale(contrast(loss, loss))"))
    stays(
        HEAD + left + MADE + "scaler = GradScaler()\n" + loop,
        (4, "no model that this file makes"),
        (12, "`contrast`, which this calls, is left as it is"),
    )


def test_code_without_gradients_that_stays_keeps_nobody() -> None:
    left = _in("@torch.no_grad()\ndef show(a):", "with autocast():\n    return a @ a.t()")
    loop = _in("for x in loader:", STEP + "show(x)")
    code, result = rewritten(HEAD + left + MADE + "scaler = GradScaler()\n" + loop)
    assert result.changed and 'wrapprec.wrap(model, optimizer, "16-mixed")' in code
    assert [one.line for one in result.left] == [5]


def test_a_model_that_another_function_trains_in_float32_stays() -> None:
    warm = _in("def warm(model, optimizer):", "loss = model(x).mean()\nloss.backward()\noptimizer.step()")
    evaluate = _in("@torch.no_grad()\ndef evaluate(model):", "with autocast():\n    return model(x)")
    end = "warm(model, optimizer)\nevaluate(model)\n"
    stays(HEAD + warm + evaluate + MADE + end, (4, "`model` trains without autocast here"))


def test_a_function_for_float32_beside_one_for_amp_is_the_flag() -> None:
    amp = _in("def mixed(model, optimizer, scaler):", STEP)
    full = _in("def full(model, optimizer):", "loss = model(x).mean()\nloss.backward()\noptimizer.step()")
    main = (
        MADE
        + "scaler = GradScaler()\nif flag:\n    mixed(model, optimizer, scaler)\nelse:\n    full(model, optimizer)\n"
    )
    code, result = rewritten(HEAD + amp + full + main)
    assert not result.left and 'wrapprec.wrap(model, optimizer, "16-mixed", enabled=flag)' in code


def test_a_scaler_that_is_used_from_outside_of_its_class_stays() -> None:
    trainer = """
        import torch

        class Trainer:
            def __init__(self, model):
                self.model = model
                self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                self.scaler = torch.amp.GradScaler("cuda")

            def step(self, x):
                with torch.autocast("cuda"):
                    loss = self.model(x).mean()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
        """
    more = """
        trainer = Trainer(torch.nn.Linear(4, 2))
        torch.save(trainer.scaler.state_dict(), "scaler.pt")
        """
    below = """
        class More(Trainer):
            def log(self):
                print(self.scaler.get_scale())
        """
    stays(trainer + more, (17, "`trainer.scaler` may be the scaler"))
    code, result = rewritten(textwrap.dedent(trainer) + textwrap.dedent(below))  # a class below is the same object
    assert not result.left and "self.handle = wrapprec.wrap(" in code and "print(self.handle.scale)" in code


def test_an_optimizer_that_is_made_anew_is_not_wrapped_for_half_of_its_life() -> None:
    loop = _in("for x in loader:", "loss = model(x).mean()\nloss.backward()\noptimizer.step()\noptimizer.zero_grad()")
    again = "optimizer = torch.optim.Adam(model.parameters())\n"
    stays("import torch\n" + MADE + loop + again + loop, (7, "`optimizer` steps here, before"))
    amp = _in("for x in loader:", STEP)
    stays(HEAD + MADE + "scaler = GradScaler()\n" + amp + again + amp, (10, "`optimizer` steps here, before"))
    inside = _in("def restart():", "global optimizer\n" + again)
    stays("import torch\n" + inside + MADE + loop, (4, "`optimizer` is made anew here"))


def test_an_optimizer_chosen_among_several_is_made_once() -> None:
    made = """model = torch.nn.Linear(4, 2)
if flag:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
else:
    optimizer = torch.optim.Adam(model.parameters())
"""
    loop = _in("for x in loader:", "loss = model(x).mean()\nloss.backward()\noptimizer.step()")
    line = 'wrapprec.wrap(model, optimizer, "auto")\n'
    becomes("import torch\n" + made + loop, "import torch\nimport wrapprec\n" + made + line + loop)


def test_an_elif_whose_sides_say_the_same_becomes_an_else() -> None:
    amp = "with autocast():\n    loss = model(x).mean()\nscaler.scale(loss).backward()\nscaler.step(optimizer)"
    full = "loss = model(x).mean()\nloss.backward()\noptimizer.step()"
    body = _in("if dry:", "print(x)") + _in("# mixed\nelif amp:", f"# now\n{amp}") + _in("else:", full)
    code, result = rewritten(HEAD + MADE + "scaler = GradScaler(enabled=amp)\n" + _in("for x in loader:", body))
    wanted = _in("if dry:", "print(x)") + _in("# mixed\nelse:", f"# now\n{full}")
    assert not result.left and code.endswith(_in("for x in loader:", wanted))
    only = _in("if dry:", "print(x)") + _in("elif amp:", "scaler.update()") + "x = 1\n"
    code, result = rewritten(HEAD + MADE + "scaler = GradScaler(enabled=amp)\n" + _in("for x in loader:", STEP + only))
    assert not result.left and code.endswith("    if dry:\n        print(x)\n    x = 1\n")


def test_a_step_that_names_its_optimizer_by_keyword_is_a_step() -> None:
    loop = STEP.replace("step(optimizer)", "step(optimizer=optimizer)")
    code, result = rewritten(HEAD + MADE + "scaler = GradScaler()\n" + loop)
    assert not result.left and code.endswith("loss.backward()\noptimizer.step()\n")


def test_torch_and_apex_in_one_function_stay_both() -> None:
    apex = _in(
        "else:", "with amp.scale_loss(model(x).mean(), optimizer) as loss:\n    loss.backward()\noptimizer.step()"
    )
    both = "scaler = GradScaler()\nif old:\n    model, optimizer = amp.initialize(model, optimizer, opt_level='O1')\n"
    loop = _in("for x in loader:", _in("if not old:", STEP) + apex)
    _, result = rewritten(HEAD + "from apex import amp\n" + MADE + both + loop)
    assert not result.changed
    assert [one.words for one in result.left] == [
        "several kinds of mixed precision are used together here: keep one by hand"
    ] * 2


def test_a_defect_of_the_rewriter_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("broken")

    monkeypatch.setattr(files, "rewrite", broken)
    script = tmp_path / "train.py"
    script.write_text("x = 1\n")
    assert main([str(script), "--write"]) == 2
    said = capsys.readouterr().err
    assert "Received: TypeError: broken" in said and str(script) in said and "please report the file" in said


def test_a_parameter_is_no_model() -> None:
    made = """model = torch.nn.Linear(4, 2)
prompt = torch.nn.Parameter(torch.zeros(3, 4))
optimizer = torch.optim.SGD([*model.parameters(), prompt], lr=0.1)
"""
    loop = "loss = model(prompt).mean()\nloss.backward()\noptimizer.step()\n"
    line = 'wrapprec.wrap(model, optimizer, "auto")\n'
    becomes("import torch\n" + made + loop, "import torch\nimport wrapprec\n" + made + line + loop)


def test_a_copied_teacher_is_told_of() -> None:
    loop = STEP.replace("model(x)", "(model(x) - teacher(x))")
    code, result = rewritten(
        HEAD + "import copy\n" + MADE + "teacher = copy.deepcopy(model)\nscaler = GradScaler()\n" + loop
    )
    assert "autocast" not in code
    assert [one.words for one in result.notes] == [
        "`teacher` has no optimizer, is not wrapped, and computes in float32 now"
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model, optimizer, x, *, scaler", "model, optimizer, x"),
        ("model, optimizer, x, *, scaler, k=1", "model, optimizer, x, *, k=1"),
        ("model, optimizer, x, *rest, scaler", "model, optimizer, x, *rest"),
        ("model, optimizer, x, *, scaler, **more", "model, optimizer, x, **more"),
        ("scaler, /, model, optimizer, x", "model, optimizer, x"),
        ("model, scaler, /, optimizer, x", "model, /, optimizer, x"),
    ],
)
def test_a_star_or_slash_goes_with_the_only_parameter_that_it_speaks_of(before: str, after: str) -> None:
    function = _in(f"def step({before}):", STEP)
    given = before.split("/")[0].split("*")[0].replace("x", "1").strip(" ,")
    given += ", optimizer, 1" if "/" in before and "scaler, /, o" in before else ""
    given += ", model, optimizer, 1" if before.startswith("scaler") else ", scaler=scaler" if "*" in before else ""
    code, result = rewritten(HEAD + function + MADE + f"scaler = GradScaler()\nstep({given})\n")
    assert not result.left and f"def step({after}):\n" in code


def test_a_magic_of_several_lines_survives() -> None:
    cells = [
        "!pip install \\\n  torch \\\n  numpy\nimport torch\n",
        MADE,
        "  %time x = \\\n  1\n",
        "for x in y:\n    model(x).mean().backward()\n    optimizer.step()",
    ]
    cells[2] = "if y:\n    %time x = \\\n    1"
    made = [{"cell_type": "code", "source": cell} for cell in cells]
    after, result = rewrite_notebook(json.dumps({"cells": made}))
    assert result.changed and not result.left
    got = [cell["source"] for cell in json.loads(after)["cells"]]
    assert got[0] == cells[0] + "import wrapprec\n" and got[2:] == cells[2:]
    assert got[1] == MADE + 'wrapprec.wrap(model, optimizer, "auto")\n'


def test_a_loop_whose_optimizer_is_not_known_is_left_with_a_reason() -> None:
    run = "optimizer = optimizer or None\nmodel(x).mean().backward()\noptimizer.step()\noptimizer.zero_grad()"
    end = _in("def run(model, optimizer):", run) + "run(model, optimizer)\n"
    stays("import torch\n" + MADE + end, (6, "optimizer this loop trains is not known"))


def test_a_loss_that_is_called_at_once_is_no_module_of_which_to_tell() -> None:
    double = _in("class Double(torch.autograd.Function):", "def forward(ctx, x):\n    return x * 2")
    crit = _in("class Crit(torch.nn.Module):", "def forward(self, x):\n    return x.mean()")
    loop = STEP.replace("loss = model(x).mean()", "y = Double.apply(model(x)).mean()\n    loss = Crit()(y)")
    code, result = rewritten(HEAD + double + crit + MADE + "scaler = GradScaler()\n" + loop)
    assert "autocast" not in code and not result.left and not result.notes
