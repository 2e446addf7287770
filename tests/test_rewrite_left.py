"""What the rewriter leaves as it is, with line and reason, and that it never does half of anything."""

from __future__ import annotations

import textwrap

import pytest
from rewriting import becomes, rewritten, stays

HEAD = """
import torch
from torch.cuda.amp import GradScaler, autocast

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = GradScaler()
"""
LOOP = """
for x in loader:
    with autocast():
        loss = model(x).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
"""


@pytest.mark.parametrize(
    ("more", "line", "reason"),
    [
        ("print(scaler._scale)", 15, "which wrapprec's handle does not have"),
        ("scaler.update(512.0)", 15, "sets or gives a value"),
        ("print(scaler.get_growth_factor())", 15, "has no counterpart"),
        ("keep(scaler)", 15, "does not show what it does with it"),
        ("x = [scaler]", 15, "used in a way that has no counterpart"),
        ("inv = 1.0 / scaler.get_scale()", 15, "the scale is calculated with"),
        ("g = torch.autograd.grad(scaler.scale(loss), [x])", 15, "used for more than backward()"),
        ("y = scaler.scale(loss)\nprint(y)", 15, "used for more than backward()"),
        ("y = model(x)", 15, "outside of autocast"),
        ("with autocast(enabled=False):\n    y = model(x)", 15, "switched off here"),
        ("with torch.autocast('cuda', torch.bfloat16):\n    y = model(x)", 15, "in several ways"),
        ("with autocast(enabled=flag):\n    y = model(x)", 15, "in several ways"),
        ("with autocast():\n    y = x @ x", 15, "no model that this file makes"),
        ("make = [autocast]", 15, "passed on, not called"),
        ("context = [autocast()]", 15, "in a way that is not known"),
        ("for flag in (True, False):\n    with autocast(enabled=flag):\n        y = model(x)", 16, "depends on"),
    ],
)
def test_one_use_without_a_counterpart_keeps_the_whole_group(more: str, line: int, reason: str) -> None:
    stays(HEAD + LOOP + more + "\n", (line - 1, reason))


def test_the_same_without_that_use_is_rewritten() -> None:
    becomes(
        HEAD + LOOP,
        """
        import torch
        import wrapprec

        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapprec.wrap(model, optimizer, "16-mixed")

        for x in loader:
            loss = model(x).sum()
            loss.backward()
            optimizer.step()
        """,
    )


def test_functions_that_share_nothing_are_decided_one_by_one() -> None:
    source = """
    import torch
    from torch.cuda.amp import GradScaler, autocast

    def good(loader):
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = GradScaler()
        for x in loader:
            with autocast():
                loss = model(x).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    def bad(loader):
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = GradScaler()
        for x in loader:
            with autocast():
                loss = model(x).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(2.0)
    """
    before = textwrap.dedent(source).lstrip("\n")
    code, result = rewritten(before)
    assert [remark.line for remark in result.left] == [25 - 1]
    at = "def bad"
    assert code[code.index(at) :] == before[before.index(at) :]
    assert "scaler" not in code[: code.index(at)] and "wrapprec.wrap(model, optimizer" in code
    assert "from torch.cuda.amp import GradScaler, autocast" in code, "the function that stays needs it"


def test_a_scaler_of_two_methods_is_one_group() -> None:
    stays(
        """
        import torch
        from torch.amp import GradScaler

        class Trainer:
            def __init__(self, model):
                self.model = model
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
                self.scaler = GradScaler("cuda")

            def step(self, x):
                with torch.autocast("cuda"):
                    loss = self.model(x).sum()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()

            def odd(self):
                return self.scaler._found_inf_per_device(self.optimizer)
        """,
        (18, "`self.scaler._found_inf_per_device` has no counterpart"),
    )


def test_model_and_optimizer_of_another_file_are_not_guessed() -> None:
    stays(
        """
        import torch

        def train_one_epoch(model, optimizer, loader, scaler):
            for x in loader:
                with torch.autocast("cuda"):
                    loss = model(x).sum()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        """,
        (5, "no model that this file makes"),
        (7, "`scaler` scales here"),
    )


def test_a_function_that_may_run_twice_for_one_model_is_left() -> None:
    stays(
        """
        import torch

        model = torch.nn.Linear(4, 1)

        def train(loader):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for x in loader:
                with torch.autocast("cuda"):
                    loss = model(x).sum()
                loss.backward()
                optimizer.step()

        for epoch in range(10):
            train(loader)
        """,
        (6, "may run more than once for the model"),
    )


def test_a_loop_that_makes_a_model_each_time_is_rewritten_and_one_that_does_not_is_left() -> None:
    source = """
    import torch

    {before}for fold in range(5):
    {inside}    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in loader:
            with torch.autocast("cuda"):
                loss = model(x).sum()
            loss.backward()
            optimizer.step()
    """
    make = "model = torch.nn.Linear(4, 1)\n    "
    text = textwrap.dedent(source)
    code, result = rewritten(text.replace("{before}", "").replace("{inside}", f"    {make.rstrip()}\n"))
    assert not result.left
    assert (
        '    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n    wrapprec.wrap(model, optimizer, "16-mixed")'
        in code
    )
    _, result = rewritten(text.replace("{before}", make.rstrip(" ")).replace("{inside}", ""))
    assert "made in a loop" in result.left[0].words and not result.changed


def test_an_island_of_float32_inside_a_model_of_another_file_needs_nothing() -> None:
    stays(
        """
        import torch
        from torch import nn

        class Head(nn.Module):
            def forward(self, x):
                with torch.autocast("cuda", enabled=False):
                    return x.float().exp()
        """
    )


def test_a_model_class_under_autocast_whose_instances_are_elsewhere_is_left() -> None:
    stays(
        """
        import torch
        from torch import nn

        class Net(nn.Module):
            @torch.autocast("cuda")
            def forward(self, x):
                return x @ x
        """,
        (5, "made in another file"),
    )


def test_plain_loops_that_something_else_manages_are_left() -> None:
    for line, reason in [
        ("import accelerate", "accelerate may manage precision here"),
        ("from lightning.fabric import Fabric", "lightning may manage precision here"),
        ("torch.set_default_dtype(torch.float64)", "sets a precision itself"),
        ("model.bfloat16()", "sets a precision itself"),
    ]:
        _, result = rewritten(
            "import torch\nmodel = torch.nn.Linear(2, 1)\n"
            f"{line}\n"
            "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
            "model(torch.ones(2)).sum().backward()\noptimizer.step()\n"
        )
        assert not result.changed and reason in result.left[0].words, line


def test_a_file_that_uses_wrapprec_already_is_not_added_to() -> None:
    stays(
        "import wrapprec\n" + HEAD.strip() + "\n" + LOOP + "wrapprec.wrap(model, optimizer)\n",
        (12, "uses wrapprec already"),
    )


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("model, optimizer = amp.initialize(model, optimizer, cast_model_type=torch.float16)", "cast_model_type"),
        ("model, other = amp.initialize(model, optimizer)", "other names than it gets"),
        ("model, optimizer = amp.initialize(*both)", "is not called as"),
        ("amp.init()", "wrapprec.migrate.apex has it"),
    ],
)
def test_apex_without_a_counterpart_is_left_with_the_shim_as_remedy(call: str, reason: str) -> None:
    stays(
        f"import torch\nfrom apex import amp\nmodel = torch.nn.Linear(2, 1)\n"
        f"optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n{call}\n",
        (5, reason),
    )


def test_copies_of_a_half_model_in_a_form_that_is_not_known_are_left() -> None:
    stays(
        """
        import torch
        model = torch.nn.Linear(2, 1).half()
        master = [p.float() for p in model.parameters()]
        optimizer = torch.optim.SGD(master, lr=0.1)
        model(x).sum().backward()
        for p, m in zip(model.parameters(), master):
            m.grad = p.grad.float() * 3
        optimizer.step()
        """,
        (6, "of no known form"),
    )
