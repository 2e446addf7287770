"""Loops that stay in float32 are spoken of, each with line and reason; and comments within what goes stay."""

from __future__ import annotations

import pytest
from rewriting import becomes, rewritten, stays

CONDITION = """
import torch

def main(args, loader):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if args.optim == "sgd" else None
    train(model, optimizer, loader)

def train(model, optimizer, loader):
    for x in loader:
        model(x).sum().backward()
        optimizer.step()
"""
GOOD = """
def good(loader):
    net = torch.nn.Linear(2, 1)
    best = torch.optim.SGD(net.parameters(), lr=0.1)
    {wrap}for x in loader:
        best.zero_grad()
        net(x).sum().backward()
        best.step()
"""
REASON = "`optimizer`, which this loop steps, is made by a condition"


def test_a_loop_whose_optimizer_may_be_none_is_reported_where_it_goes_backward() -> None:
    stays(CONDITION, (10, REASON))


def test_it_is_reported_beside_a_loop_that_is_rewritten_and_once_more_afterwards() -> None:
    code, result = rewritten(CONDITION + GOOD.replace("{wrap}", ""))
    want = CONDITION.replace("import torch\n", "import torch\nimport wrapprec\n")
    assert code == want + GOOD.replace("{wrap}", 'wrapprec.wrap(net, best, "auto")\n    ')
    assert [(one.line, REASON in one.words) for one in result.left] == [(11, True)]
    _, again = rewritten(code)
    assert [(one.line, REASON in one.words) for one in again.left] == [(12, True)]


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        (
            "def fit(model, optimizer, loader):\n    for x in loader:\n        model(x).sum().backward()\n"
            "        optimizer.step()\n",
            3,
            "which model and optimizer this loop trains is not known",
        ),
        (
            "def step(model, optimizer, x):\n    model(x).sum().backward()\n    optimizer.step()\n",
            2,
            "which model and optimizer this loop trains is not known",
        ),
        (
            "import accelerate\nfor x in loader:\n    accelerator.backward(model(x).sum())\n",
            3,
            "accelerate may manage precision here",
        ),
        (
            "import torch\nmodel = torch.nn.Linear(2, 1)\noptimizer = None\nif flag:\n"
            "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nfor x in loader:\n"
            "    model(x).sum().backward()\n    (optimizer or other).step()\n",
            7,
            "not known",
        ),
    ],
)
def test_a_loop_that_this_file_does_not_show_is_reported(source: str, line: int, reason: str) -> None:
    stays(source, (line, reason))


def test_a_plain_loop_beside_mixed_precision_is_reported() -> None:
    code, result = rewritten(
        "import torch\n\ndef mixed(loader):\n    model = torch.nn.Linear(2, 1)\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n    for x in loader:\n"
        "        with torch.autocast('cuda'):\n            loss = model(x).sum()\n        loss.backward()\n"
        "        optimizer.step()\n" + GOOD.replace("{wrap}", "")
    )
    assert 'wrapprec.wrap(model, optimizer, "16-mixed")' in code
    assert [(one.line, "in a file that uses it elsewhere" in one.words) for one in result.left] == [(17, True)]


def test_gradients_without_a_loop_or_a_step_are_no_training() -> None:
    stays("def saliency(model, x):\n    model(x).sum().backward()\n    return x.grad\n")


def test_a_backward_in_a_helper_of_a_rewritten_loop_is_not_reported() -> None:
    code, result = rewritten(
        "import torch\nmodel = torch.nn.Linear(2, 1)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "def back(loss):\n    for one in loss:\n        one.backward()\n"
        "for x in loader:\n    back(model(x))\n    optimizer.step()\n"
    )
    assert "wrapprec.wrap(" in code and not result.left


def test_comments_within_the_parentheses_of_what_goes_stay_as_lines_above() -> None:
    becomes(
        """
        import torch
        from torch.cuda.amp import (
            autocast,  # cast
            GradScaler,  # noqa
        )
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # made
        scaler = GradScaler(  # scaling
            init_scale=2.0,  # low
        )  # end
        def train(
            model,
            scaler,  # it scales
            loader,  # it loads
        ):
            for x in loader:
                # first
                with autocast(
                    enabled=True,  # yes
                    # lone
                ):  # head
                    loss = model(x).sum()
                scaler.scale(loss).backward()
                scaler.step(
                    # step it
                    optimizer,
                )
                scaler.update(
                    # none
                )
        train(model, scaler, loader)
        """,
        """
        import torch
        # cast
        import wrapprec
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # made
        # scaling
        # low
        wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=wrapprec.LossScale(init_scale=2.0))  # end
        # it scales
        def train(
            model,
            loader,  # it loads
        ):
            for x in loader:
                # first
                # yes
                # lone
                # head
                loss = model(x).sum()
                loss.backward()
                # step it
                optimizer.step()
                # none
        train(model, loader)
        """,
    )


def test_comments_of_items_and_decorators_that_stay_are_not_doubled() -> None:
    becomes(
        """
        import torch
        model = torch.nn.Linear(4, 1)
        @torch.autocast("cuda")  # cast
        @torch.no_grad()  # quiet
        def look(
            x,  # what
        ):
            return model(x)
        with (
            torch.no_grad(),  # no graph
            torch.autocast("cuda"),  # half
        ):
            y = model(x)
        """,
        """
        import torch
        import wrapprec
        model = torch.nn.Linear(4, 1)
        wrapprec.wrap(model, policy="16-mixed")
        # cast
        @torch.no_grad()  # quiet
        def look(
            x,  # what
        ):
            return model(x)
        # no graph
        # half
        with torch.no_grad():
            y = model(x)
        """,
    )
