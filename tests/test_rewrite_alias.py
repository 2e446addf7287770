"""Autocast and GradScaler under names that are assigned, and scalers that all objects of a class share."""

from __future__ import annotations

import pytest
from rewriting import becomes, rewritten, stays

SCRIPT = """
import torch
{alias}
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = Scaler()
for x in loader:
    with cast():
        loss = model(x).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
"""
ALIASES = "cast = torch.cuda.amp.autocast  # old\nScaler = torch.cuda.amp.GradScaler\n"


@pytest.mark.parametrize(
    ("alias", "kept"),
    [
        (ALIASES, "# old\n"),
        ("from torch.cuda import amp\n" + ALIASES.replace("torch.cuda.", ""), "# old\n"),
        ("first = torch.cuda.amp.autocast\ncast = first\nScaler = torch.cuda.amp.GradScaler\n", ""),
        ("from torch.cuda.amp import autocast\ncast = autocast\nScaler = torch.amp.GradScaler\n", ""),
    ],
)
def test_a_name_that_is_set_once_is_what_it_is_set_to_and_goes_with_its_uses(alias: str, kept: str) -> None:
    code, result = rewritten(SCRIPT.replace("{alias}\n", alias))
    want = f"""
import torch
import wrapprec
{kept}model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
wrapprec.wrap(model, optimizer, "16-mixed")
for x in loader:
    loss = model(x).sum()
    loss.backward()
    optimizer.step()
"""
    assert code == want and not result.left


def test_an_alias_that_something_else_still_uses_stays() -> None:
    source = SCRIPT.replace("{alias}\n", ALIASES) + "\nclass Net(torch.nn.Module):\n"
    source += "    def forward(self, x):\n        with cast(enabled=False):\n            return x\n"
    code, result = rewritten(source)
    assert "cast = torch.cuda.amp.autocast  # old\n" in code and "Scaler" not in code and not result.left
    assert "with cast(enabled=False):" in code


def test_a_name_that_is_set_twice_is_left() -> None:
    source = SCRIPT.replace("{alias}\n", ALIASES + "if old:\n    cast = torch.autocast\n")
    code, result = rewritten(source)
    assert code == source
    assert (3, "`cast` is set more than once: which autocast it is, is not known") in [
        (one.line, one.words) for one in result.left
    ]


def test_a_name_of_another_function_is_another_name() -> None:
    becomes(
        """
        import torch
        cast = torch.cuda.amp.autocast
        model = torch.nn.Linear(4, 1)
        def look(cast, x):
            return cast(x)
        with cast():
            y = look(int, model(x))
        """,
        """
        import torch
        import wrapprec
        cast = torch.cuda.amp.autocast
        model = torch.nn.Linear(4, 1)
        wrapprec.wrap(model, policy="16-mixed")
        def look(cast, x):
            return cast(x)
        y = look(int, model(x))
        """,
    )


def test_a_scaler_in_the_body_of_a_class_is_left_with_the_reason() -> None:
    stays(
        """
        import torch

        class Trainer:
            scaler = torch.amp.GradScaler("cuda")

            def __init__(self):
                self.model = torch.nn.Linear(4, 1)
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

            def fit(self, loader):
                for x in loader:
                    with torch.autocast("cuda"):
                        loss = self.model(x).sum()
                    self.scaler.scale(loss).backward()
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
        """,
        (4, "all its objects share it: make it where the optimizer is made"),
        (14, "`self.scaler` is made in the body of the class"),
    )
