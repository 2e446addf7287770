"""A closure is evaluated again at a lower scale, and a step is given up only at the lowest, without a trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec
from wrapprec import LossScale, NonFiniteError, StepError


class Limit(torch.autograd.Function):
    """Identity; in backward what exceeds the limit overflows, as in float16 but at a size of the test's choice."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where(grad.abs() > ctx.limit, math.inf, grad), None


class Narrow(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.limit = nn.Linear(3, 4), nn.Linear(4, 1), limit

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(Limit.apply(torch.tanh(self.inner(x)), self.limit))


X = torch.linspace(-1, 1, 12).reshape(4, 3)
KINDS: dict[str, Any] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "fused Adam": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=3),
    "LBFGS wolfe": lambda params: torch.optim.LBFGS(params, max_iter=3, line_search_fn="strong_wolfe"),
}


class Closure:
    """The usual one, counting how often it runs and spoiling chosen runs."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, bad_from: float = math.inf) -> None:
        self.model, self.optimizer, self.bad_from, self.runs = model, optimizer, bad_from, 0

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.model(X) - 1.0).square().mean()
        (loss * (math.inf if self.runs >= self.bad_from else 1.0)).backward()
        self.runs += 1
        return loss


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_that_overflows_is_evaluated_again_at_a_lower_scale(kind: str, policy: str, by_keyword: bool) -> None:
    model, reference = Narrow(limit=1.0), Narrow(limit=math.inf)
    optimizer, theirs = KINDS[kind](model.parameters()), KINDS[kind](reference.parameters())
    handle = wrapprec.wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=256.0))
    closure, plain = Closure(model, optimizer), Closure(reference, theirs)
    for _ in range(4):
        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        expected = theirs.step(plain)
        # A float16 output is rounded to 2**-11.
        torch.testing.assert_close(loss, expected, atol=5e-3, rtol=1e-2)
    assert handle.scale < 256.0 and handle.skipped_steps == 0 and not handle.step_was_skipped
    if kind != "LBFGS wolfe":  # how long a line search takes is up to rounding
        assert closure.runs == plain.runs + math.log2(256.0 / handle.scale)
    # Four to twelve steps with gradients rounded to 2**-11.
    torch.testing.assert_close(flat(model), flat(reference), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_given_up_at_the_lowest_scale_leaves_all_as_it_was(kind: str, after: int, static: bool) -> None:
    model = Narrow(limit=math.inf)
    optimizer = KINDS[kind](model.parameters())
    scale = LossScale.static(8.0) if static else LossScale(init_scale=8.0, min_scale=2.0)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=scale)
    for _ in range(after):
        optimizer.step(Closure(model, optimizer))
    weights, state = flat(model), copy.deepcopy(optimizer.state_dict())
    loss = optimizer.step(Closure(model, optimizer, bad_from=0))
    assert torch.isfinite(loss)  # the closure's value is given back all the same
    assert handle.step_was_skipped and handle.skipped_steps == 1
    assert torch.equal(flat(model), weights)
    assert str(optimizer.state_dict()) == str(state)
    if not static:
        assert handle.scale == 2.0
    before = flat(model)
    optimizer.step(Closure(model, optimizer))
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", ["LBFGS", "LBFGS wolfe"])
@pytest.mark.parametrize("after", [0, 2])
def test_lbfgs_that_overflows_in_a_later_evaluation_is_put_back(kind: str, after: int) -> None:
    model = Narrow(limit=math.inf)
    optimizer = KINDS[kind](model.parameters())
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=8.0)
    for _ in range(after):
        optimizer.step(Closure(model, optimizer))
    weights, state = flat(model), copy.deepcopy(optimizer.state_dict())
    optimizer.step(Closure(model, optimizer, bad_from=2))
    assert handle.step_was_skipped and torch.equal(flat(model), weights)
    assert str(optimizer.state_dict()) == str(state)
    assert all(any(key is p for p in model.parameters()) for key in optimizer.state)
    optimizer.step(Closure(model, optimizer))
    assert not torch.equal(flat(model), weights)


def test_a_closure_that_only_accumulates_is_repeated_from_no_gradient() -> None:
    model = Narrow(limit=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(init_scale=256.0))

    def closure() -> Tensor:
        loss = (model(X) - 1.0).square().mean()
        loss.backward()
        return loss

    before = flat(model)
    optimizer.step(closure)
    assert not handle.step_was_skipped and not torch.equal(flat(model), before)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_closure_over_gradients_accumulated_before_skips_instead_of_losing_them() -> None:
    model = Narrow(limit=math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(init_scale=256.0))
    model(X).mean().backward()

    def closure() -> Tensor:
        loss = model(X).mean()
        (loss * math.inf).backward()
        return loss

    before = flat(model)
    optimizer.step(closure)
    assert handle.step_was_skipped and torch.equal(flat(model), before) and handle.scale == 128.0


def test_set_to_none_false_in_a_closure_is_repeated_too() -> None:
    model = Narrow(limit=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(init_scale=256.0))

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = (model(X) - 1.0).square().mean()
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    assert not handle.step_was_skipped and handle.scale < 256.0


def test_giving_up_in_a_row_raises_and_leaves_all_as_it_was() -> None:
    model = Narrow(limit=math.inf)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(1.0, max_consecutive_skips=2))
    weights = flat(model)
    with pytest.raises(NonFiniteError):
        for _ in range(5):
            optimizer.step(Closure(model, optimizer, bad_from=0))
    assert torch.equal(flat(model), weights)


class Twice(torch.optim.SGD):
    """Evaluates its closure again after it has moved the weights, as SAM does."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            return closure()


def test_an_optimizer_that_cannot_be_put_back_says_so() -> None:
    model = Narrow(limit=math.inf)
    optimizer = Twice(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=8.0)
    with pytest.raises(StepError, match="Twice") as caught:
        optimizer.step(Closure(model, optimizer, bad_from=1))
    assert "Remedy: " in str(caught.value)


def test_an_exception_in_the_closure_is_the_users() -> None:
    model = Narrow(limit=math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=8.0)

    def closure() -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        optimizer.step(closure)
    optimizer.step(Closure(model, optimizer))
