"""What a handle tells, for one model, for several, and for none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import wrapprec
from wrapprec import LossScale, NotWrappedError, WrapprecError, WrapprecWarning


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, bad: bool = False) -> None:
    optimizer.zero_grad()
    (model(torch.ones(2, 3)).mean() * (math.inf if bad else 1.0)).backward()
    optimizer.step()


def test_plan_policy_scale_and_text_of_one_model() -> None:
    model = net()
    handle = wrapprec.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "16-mixed")
    assert handle.plan == wrapprec.resolve(model, "16-mixed") == handle.plans[0]
    assert str(handle.policy) == "16-mixed"
    assert handle.scale == 2.0**16 and handle.scales == (2.0**16,)
    assert str(handle) == handle.explain() == str(handle.plan) and "Linear" in str(handle)


def test_several_models_have_a_plan_and_a_scale_each() -> None:
    models = [net(), net()]
    handle = wrapprec.wrap(models, policy="16-mixed")
    assert handle.scales == (2.0**16, 2.0**16) and len(handle.plans) == 2
    for name in ("plan", "scale"):
        with pytest.raises(WrapprecError, match=f"a handle of one model for .{name}") as caught:
            getattr(handle, name)
        assert f"use .{name}s" in str(caught.value)
    assert str(handle.policy) == "16-mixed"


def test_step_was_skipped_is_about_the_last_step_of_any_optimizer() -> None:
    models = [net(), net()]
    optimizers = [
        torch.optim.SGD(models[0].parameters(), lr=0.1),
        torch.optim.AdamW(models[1].parameters(), lr=0.1, fused=True),
    ]
    handle = wrapprec.wrap(models, optimizers, "16-mixed", loss_scale=LossScale(8.0))
    assert not handle.step_was_skipped
    for which, bad, total in ((0, True, 1), (1, False, 1), (1, True, 2), (0, False, 2)):
        step(models[which], optimizers[which], bad)
        assert handle.step_was_skipped == bad and handle.skipped_steps == total


def test_attach_refuses_what_is_no_optimizer() -> None:
    handle = wrapprec.wrap(net(), policy="16-mixed")
    with pytest.raises(TypeError, match=r"Expected a torch\.optim\.Optimizer") as caught:
        handle.attach("adam")  # type: ignore[arg-type]
    assert "Received: 'adam' (of type str)" in str(caught.value)


def test_attach_warns_of_parameters_that_no_wrapped_model_owns() -> None:
    model, stranger = net(), nn.Parameter(torch.ones(7))
    handle = wrapprec.wrap(model, policy="16-mixed")
    with pytest.warns(WrapprecWarning, match="1 of 5 parameters that no wrapped model owns") as caught:
        handle.attach(torch.optim.SGD([*model.parameters(), stranger], lr=0.1))
    assert len(caught) == 1 and "(7,)" in str(caught[0].message)


def test_unwrap_twice_does_nothing_more_and_the_context_manager_unwraps() -> None:
    model = net()
    before = [dict(m.__dict__) for m in model.modules()]
    with wrapprec.wrap(model, policy="16-mixed") as handle:
        assert wrapprec.handle_of(model) is handle
        model(torch.ones(2, 3))
    assert wrapprec.handle_of(model) is None
    handle.unwrap()
    assert [m.__dict__ for m in model.modules()] == before


def test_the_context_manager_unwraps_after_an_exception_too() -> None:
    model = net()
    with pytest.raises(KeyError), wrapprec.wrap(model, policy="16-mixed"):
        raise KeyError("mine")
    assert wrapprec.handle_of(model) is None


def test_unwrapping_a_plain_model_says_what_to_do() -> None:
    with pytest.raises(NotWrappedError, match="Expected a wrapped model") as caught:
        wrapprec.unwrap(net())
    assert "Remedy: call wrapprec.wrap" in str(caught.value)


def test_reset_closes_what_an_interrupt_left_open() -> None:
    model = net()
    handle = wrapprec.wrap(model, policy="16-mixed")
    handle.reset()  # nothing is open: nothing happens
    assert all(p.dtype is torch.float32 for p in model.parameters())
