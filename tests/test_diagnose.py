"""The error that ends training names where inf or nan came from first, and whether a lower scale could have helped."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wrapprec
from wrapprec import LossScale, NonFiniteError

POLICIES = ["16-mixed", "16-module"]


class Spoil(torch.autograd.Function):
    """Identity; its gradient, or its value, is spoiled."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor, value: float, gradient: float) -> Tensor:
        ctx.gradient = gradient  # type: ignore[attr-defined]
        return tensor * value

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.gradient, None, None  # type: ignore[attr-defined]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.value = self.gradient = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(Spoil.apply(x, self.value, self.gradient))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def text_of(
    policy: str,
    spoil: Callable[[Model], None],
    loss: Callable[[Tensor], Tensor] = torch.sum,
    x: Tensor | None = None,
    fused: bool = False,
) -> str:
    """Train until it raises."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    wrapprec.wrap(model, optimizer, policy, loss_scale=LossScale(1.0, max_consecutive_skips=3))
    spoil(model)
    with pytest.raises(NonFiniteError) as caught:
        for _ in range(300):
            optimizer.zero_grad()
            loss(model(torch.ones(2, 4) if x is None else x)).backward()
            optimizer.step()
    text = str(caught.value)
    assert text.startswith("Expected finite gradients.\nReceived: ") and "\nRemedy: " in text
    return text


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fused", [False, True])
def test_nan_in_forward_names_the_first_module_and_says_that_no_scale_can_help(policy: str, fused: bool) -> None:
    def spoil(model: Model) -> None:
        model.middle.value = math.nan

    text = text_of(policy, spoil, fused=fused)
    assert '"middle.linear" (Linear)' in text and "an input" in text
    assert "a lower loss scale cannot help" in text


@pytest.mark.parametrize("policy", POLICIES)
def test_float16_overflow_in_forward_names_the_module_that_made_it(policy: str) -> None:
    def spoil(model: Model) -> None:
        nn.init.constant_(model.middle.linear.weight, 6e4)
        nn.init.constant_(model.first.linear.weight, 1.0)

    text = text_of(policy, spoil)
    assert 'module "middle.linear" (Linear) returned inf or nan from finite inputs, in torch.float16' in text
    assert "a lower loss scale cannot help" in text


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fused", [False, True])
def test_inf_in_backward_alone_names_the_place_and_says_that_a_lower_scale_could_help(policy: str, fused: bool) -> None:
    def spoil(model: Model) -> None:
        model.middle.gradient = math.inf

    text = text_of(policy, spoil, fused=fused)
    assert 'forward is finite, but the gradient of the output of module "first' in text
    assert "a lower loss scale could help" in text


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_are_nan_already_are_named(policy: str) -> None:
    def spoil(model: Model) -> None:
        with torch.no_grad():
            model.last.linear.weight[1, 1] = math.nan

    text = text_of(policy, spoil)
    assert "parameter 'weight' of module \"last.linear\" (Linear) holds inf or nan" in text
    assert "a lower loss scale cannot help" in text


@pytest.mark.parametrize("policy", POLICIES)
def test_an_input_that_is_nan_is_named(policy: str) -> None:
    text = text_of(policy, lambda model: None, x=torch.full((2, 4), math.nan))
    assert 'an input of module "" (the model itself, Model) holds inf or nan' in text


@pytest.mark.parametrize("policy", POLICIES)
def test_nan_from_the_loss_is_not_blamed_on_the_model(policy: str) -> None:
    text = text_of(policy, lambda model: None, loss=lambda out: (out.sum() * 0.0).sqrt() * 0.0)
    assert "the gradient that the loss sends into" in text and "a lower loss scale cannot help" in text


def test_a_gradient_that_was_spoiled_after_backward_is_told_apart() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(1.0, max_consecutive_skips=3))
    with pytest.raises(NonFiniteError, match="but a gradient held inf or nan at the step"):
        for _ in range(5):
            model(torch.ones(2, 4)).sum().backward()
            model.last.linear.bias.grad[0] = math.inf
            optimizer.step()


def test_a_diagnosis_is_off_until_the_last_skip_before_the_error() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(2.0, max_consecutive_skips=2))
    shared = handle._models[0]
    on = []
    for bad in (False, True, True, False, False):
        on.append(shared.diagnosis is not None)
        optimizer.zero_grad()
        (model(torch.ones(2, 4)).sum() * (math.nan if bad else 1.0)).backward()
        optimizer.step()
    assert on == [False, False, False, True, False]
