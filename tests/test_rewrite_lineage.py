"""Trainers in several classes: what one sets and another one uses is one thing, rewritten together or not at all."""

from __future__ import annotations

import torch
from rewriting import becomes, rewritten

TRAINER = """
import torch
from torch.cuda.amp import GradScaler, autocast

class Base:
    def __init__(self, amp):
        self.amp = amp
        self.scaler = GradScaler(enabled=amp)

    def update(self, loss):
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

class Trainer(Base):
    def __init__(self, amp):
        super().__init__(amp)
        self.model = torch.nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def run(self, loader):
        for x in loader:
            with autocast(enabled=self.amp):
                loss = self.model(x).square().mean()
            self.update(loss)
"""
OTHER = """
class Other(Base):
    def __init__(self, amp):
        super().__init__(amp)
        self.model = torch.nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def run(self, loader):
        for x in loader:
            with autocast(enabled=self.amp):
                loss = self.model(x).square().mean()
            self.update(loss)
"""


def test_a_scaler_of_the_class_above_goes_with_the_autocast_of_the_class_below() -> None:
    """The class below was rewritten alone, and trained with the loss scale of two."""
    code, result = rewritten(TRAINER)
    assert not result.left and not result.notes
    assert "autocast" not in code and "caler" not in code
    namespace: dict[str, type] = {}
    exec(code, namespace)
    torch.manual_seed(0)
    trainer = namespace["Trainer"](False)
    before = trainer.model.weight.detach().clone()
    x = torch.ones(3, 4)
    gradient = torch.autograd.grad(trainer.model(x).square().mean(), trainer.model.weight)[0]
    trainer.run([x])
    assert torch.equal(trainer.model.weight, before - 0.1 * gradient)


def test_two_classes_below_one_scaler_are_left_together() -> None:
    """Which of the two optimizers the class above steps is not known: neither may lose its autocast."""
    code, result = rewritten(TRAINER + OTHER)
    assert code == TRAINER + OTHER and result.left


def test_a_model_above_and_its_loop_below_are_one() -> None:
    becomes(
        """
        import torch

        class Base:
            def __init__(self):
                self.model = torch.nn.Linear(4, 2)
                self.optimizer = torch.optim.SGD(self.model.parameters())

        class Trainer(Base):
            def run(self, loader):
                for x in loader:
                    with torch.autocast("cpu"):
                        loss = self.model(x).sum()
                    loss.backward()
                    self.optimizer.step()
        """,
        """
        import torch
        import wrapprec

        class Base:
            def __init__(self):
                self.model = torch.nn.Linear(4, 2)
                self.optimizer = torch.optim.SGD(self.model.parameters())
                wrapprec.wrap(self.model, self.optimizer, "bf16-mixed")

        class Trainer(Base):
            def run(self, loader):
                for x in loader:
                    loss = self.model(x).sum()
                    loss.backward()
                    self.optimizer.step()
        """,
    )


def test_a_model_under_another_name_in_two_methods_gets_one_line() -> None:
    """It got two, one in `train` and one in `evaluate`: the second would have met a wrapped model."""
    source = """
import torch

class Runner:
    def __init__(self, args):
        self.args = args
        self.model = torch.nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters())

    def train(self, loader):
        model = self.model
        if self.args.gpus > 1:
            model = torch.nn.DataParallel(model)
        for x in loader:
            with torch.autocast("cpu"):
                loss = model(x).sum()
            loss.backward()
            self.optimizer.step()

    def evaluate(self, loader):
        model = self.model
        if self.args.gpus > 1:
            model = torch.nn.DataParallel(model)
        with torch.no_grad(), torch.autocast("cpu"):
            return [model(x) for x in loader]
"""
    code, result = rewritten(source)
    assert not result.left and code.count("wrap(") == 1
    assert 'wrapprec.wrap(self.model, self.optimizer, "bf16-mixed")' in code


def test_what_is_done_with_parameters_is_no_forward_outside_of_autocast() -> None:
    """`model.reduce_parameters()`, by which processes bring gradients together, kept whole trainers as they were."""
    source = TRAINER.replace("self.update(loss)\n", "self.model.reduce_parameters()\n            self.update(loss)\n")
    code, result = rewritten(source)
    assert not result.left and "self.model.reduce_parameters()" in code and "wrapprec.wrap(" in code
