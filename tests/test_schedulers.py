"""Schedulers work without a spurious warning, hold on skipped steps, and outlive `unwrap`."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import wrapprec

pytestmark = pytest.mark.filterwarnings("error", "ignore:float16 on a CPU")

Make = Callable[[torch.optim.Optimizer], Any]
KINDS: dict[str, Make] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.5**epoch),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=30),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=10),
}


def setting(fused: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)


def backward(model: nn.Module, bad: bool) -> None:
    model.zero_grad()
    (model(torch.ones(2, 3)).mean() * (math.inf if bad else 1.0)).backward()


def advance(scheduler: Any) -> None:
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def rates(kind: str, steps: int) -> list[float]:
    """What torch alone gives."""
    _, optimizer = setting()
    scheduler = KINDS[kind](optimizer)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        advance(scheduler)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_first_step_warns_of_nothing(kind: str, before: bool, fused: bool) -> None:
    model, optimizer = setting(fused)
    scheduler = KINDS[kind](optimizer) if before else None
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0)
    scheduler = scheduler or KINDS[kind](optimizer)
    skipped, found = [], [optimizer.param_groups[0]["lr"]]
    for bad in (True, False, True, False):
        backward(model, bad)
        optimizer.step()
        advance(scheduler)
        skipped.append(handle.step_was_skipped)
        found.append(optimizer.param_groups[0]["lr"])
    assert skipped == [True, False, True, False]
    assert found == rates(kind, 4)  # not held: it advances as it is told


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_that_was_given_holds_on_every_skip(kind: str, before: bool, fused: bool) -> None:
    model, optimizer = setting(fused)
    if before:
        scheduler = KINDS[kind](optimizer)
        wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0, scheduler=scheduler)
    else:
        handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0)
        scheduler = KINDS[kind](optimizer)
        handle.attach(optimizer, scheduler)
    expected = rates(kind, 3)
    found = [optimizer.param_groups[0]["lr"]]
    for bad in (True, False, True, True, False, False):
        backward(model, bad)
        optimizer.step()
        advance(scheduler)
        found.append(optimizer.param_groups[0]["lr"])
    good = [0, 0, 1, 1, 1, 2, 3]
    assert found == [expected[i] for i in good]


@pytest.mark.parametrize("fused", [False, True])
def test_a_scheduler_stepped_once_an_epoch_holds_only_when_the_whole_epoch_was_skipped(fused: bool) -> None:
    model, optimizer = setting(fused)
    scheduler = schedulers.StepLR(optimizer, 1, gamma=0.5)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0, scheduler=scheduler)
    found = []
    for epoch in ((True, True), (True, False), (False, True), (True, True), (False, False)):
        for bad in epoch:
            backward(model, bad)
            optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert found == [0.1, 0.05, 0.025, 0.025, 0.0125]


def test_two_schedulers_of_one_optimizer_hold_and_advance_together() -> None:
    model, optimizer = setting()
    both = [schedulers.ExponentialLR(optimizer, 0.5), schedulers.ExponentialLR(optimizer, 0.1)]
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0, scheduler=both)
    found = []
    for bad in (True, False):
        backward(model, bad)
        optimizer.step()
        for scheduler in both:
            scheduler.step()
        found.append([s.last_epoch for s in both])
    assert found == [[0, 0], [1, 1]]


def test_a_scheduler_holds_when_a_closures_step_is_given_up() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0, scheduler=scheduler)
    runs = []

    def closure() -> torch.Tensor:
        backward(model, bad=len(runs) == 1)
        runs.append(1)
        return model(torch.ones(2, 3)).mean().detach()

    optimizer.step(closure)
    scheduler.step()
    assert scheduler.last_epoch == 0
    optimizer.step(closure)
    scheduler.step()
    assert scheduler.last_epoch == 1


def test_a_scheduler_stepped_without_a_step_in_between_advances() -> None:
    model, optimizer = setting()
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0, scheduler=scheduler)
    backward(model, bad=True)
    optimizer.step()
    scheduler.step()
    assert scheduler.last_epoch == 0
    with warnings.catch_warnings():
        scheduler.step()
    assert scheduler.last_epoch == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_schedulers_state_is_saved_and_loaded_as_without_wrap(kind: str) -> None:
    model, optimizer = setting()
    scheduler = KINDS[kind](optimizer)
    plain = scheduler.state_dict().keys()
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0, scheduler=scheduler)
    assert scheduler.state_dict().keys() == plain
    for _ in range(3):
        backward(model, False)
        optimizer.step()
        advance(scheduler)
    state = scheduler.state_dict()
    if kind not in ("LambdaLR", "OneCycleLR", "SequentialLR"):  # whose states hold callables and objects of torch's
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    _, other = setting()
    resumed = KINDS[kind](other)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["last_epoch"] == scheduler.last_epoch


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("held", [False, True])
def test_a_scheduler_keeps_working_after_unwrap(built: str, held: bool) -> None:
    model, optimizer = setting()
    own = dict(optimizer.__dict__)
    scheduler = KINDS["LambdaLR"](optimizer) if built == "before" else None
    with_scheduler, theirs = dict(optimizer.__dict__), None if scheduler is None else dict(scheduler.__dict__)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0)
    scheduler = scheduler or KINDS["LambdaLR"](optimizer)
    if held:
        handle.attach(optimizer, scheduler)
    handle.unwrap()
    if built == "before":
        assert optimizer.__dict__ == with_scheduler and scheduler.__dict__ == theirs
    assert "zero_grad" not in optimizer.__dict__ and own.keys() | {"step"} == optimizer.__dict__.keys() | {"step"}
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(3):
        backward(model, False)
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert found == rates("LambdaLR", 3)
    weight = model.weight.detach().clone()
    model.weight.grad.fill_(math.inf)
    optimizer.step()
    assert not torch.equal(model.weight, weight)  # nobody guards it any more


def test_a_model_is_wrapped_again_after_a_scheduler_took_the_slot() -> None:
    model, optimizer = setting()
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0)
    scheduler = KINDS["LambdaLR"](optimizer)
    handle.unwrap()
    again = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0)
    for bad in (True, False):
        backward(model, bad)
        optimizer.step()
        scheduler.step()
        assert again.step_was_skipped == bad
    assert again.skipped_steps == 1 and handle.skipped_steps == 0


def test_a_scheduler_of_another_optimizer_is_refused_and_nothing_is_changed() -> None:
    model, optimizer = setting()
    _, other = setting()
    scheduler = KINDS["LambdaLR"](other)
    with pytest.raises(ValueError, match="a scheduler of an optimizer that is given with it") as caught:
        wrapprec.wrap(model, optimizer, "16-mixed", scheduler=scheduler)
    assert "Remedy: " in str(caught.value)
    assert wrapprec.handle_of(model) is None and "step" not in optimizer.__dict__


def test_a_held_scheduler_deep_copies() -> None:
    model, optimizer = setting()
    scheduler = KINDS["LambdaLR"](optimizer)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0, scheduler=scheduler)
    twin = copy.deepcopy((model, optimizer, scheduler))[2]
    assert twin.optimizer is not optimizer and twin.last_epoch == scheduler.last_epoch
