"""The loss scale follows init * growth**g * backoff**b, and a reference written out in plain Python."""

from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.amp import GradScaler

from wrapprec.errors import PolicyError
from wrapprec.policy import LossScale
from wrapprec.scale import Scaler

CPU = torch.device("cpu")
ONE, ZERO = torch.ones(()), torch.zeros(())


def backward(scaler: Scaler, overflow: bool = False, task: int | None = None) -> None:
    scaler.begin(scaler.task + 1 if task is None else task, weakref.WeakSet())
    if overflow:
        scaler.seen.fill_(1.0)


def step(scaler: Scaler, overflow: bool = False) -> None:
    backward(scaler, overflow)
    found = torch.tensor(float(overflow))
    scaler.update(found, found)


class Reference:
    """The rule, in Python's float64; exact, because powers of two are."""

    def __init__(self, config: LossScale) -> None:
        self.config, self.scale, self.tracker, self.row = config, config.init_scale, 0, 0

    def step(self, overflow: bool) -> None:
        config = self.config
        if not config.dynamic:
            return
        if overflow:
            self.tracker, self.row = 0, self.row + 1
            if self.row >= config.hysteresis:
                self.scale = max(self.scale * config.backoff_factor, config.min_scale)
            return
        self.tracker, self.row = self.tracker + 1, 0
        if self.tracker == config.growth_interval:
            self.scale, self.tracker = min(self.scale * config.growth_factor, config.max_scale), 0


@given(
    config=st.builds(
        LossScale,
        init_scale=st.integers(0, 20).map(lambda e: 2.0**e),
        growth_factor=st.sampled_from([2.0, 4.0]),
        backoff_factor=st.sampled_from([0.5, 0.25]),
        growth_interval=st.integers(1, 4),
        max_scale=st.sampled_from([2.0**20, 2.0**24, 2.0**120]),
        hysteresis=st.integers(1, 3),
    ),
    overflows=st.lists(st.booleans(), max_size=60),
)
@settings(max_examples=150)
def test_scale_follows_the_reference_for_every_sequence(config: LossScale, overflows: list[bool]) -> None:
    scaler, reference = Scaler(config, CPU), Reference(config)
    for overflow in overflows:
        step(scaler, overflow)
        reference.step(overflow)
        assert scaler.scale.item() == reference.scale
        assert scaler.growth_tracker.item() == reference.tracker


@given(overflows=st.lists(st.booleans(), max_size=40))
@settings(max_examples=60)
def test_scale_follows_grad_scaler_when_there_is_no_bound_and_no_hysteresis(overflows: list[bool]) -> None:
    scaler = Scaler(LossScale(init_scale=2.0**10, growth_interval=3, min_scale=2.0**-100), CPU)
    theirs = GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.0)
    for overflow in overflows:
        step(scaler, overflow)
        param.grad = torch.full((1,), math.inf if overflow else 1.0)
        theirs.scale(ONE)
        theirs.step(optimizer)
        theirs.update()
        assert scaler.scale.item() == theirs.get_scale()


def test_scale_is_init_times_powers_of_the_factors() -> None:
    scaler = Scaler(LossScale(init_scale=2.0**8, growth_factor=4.0, backoff_factor=0.125, growth_interval=1), CPU)
    for overflow in (False, True, False, False, True):
        step(scaler, overflow)
    assert scaler.scale.item() == 2.0**8 * 4.0**3 * 0.125**2


def test_scale_never_falls_below_min_scale() -> None:
    scaler = Scaler(LossScale(init_scale=8.0, min_scale=2.0), CPU)
    for _ in range(200):
        step(scaler, True)
    assert scaler.scale.item() == 2.0


@pytest.mark.parametrize("most", [2.0**10, 2.0**120, 1e38, 1e300])
def test_scale_never_becomes_inf_and_neither_does_its_reciprocal(most: float) -> None:
    scaler = Scaler(LossScale(init_scale=1.0, growth_interval=1, growth_factor=1e30, max_scale=most), CPU)
    for _ in range(20):
        step(scaler)
    assert math.isfinite(scaler.scale.item()) and scaler.scale.item() <= most
    assert scaler.scale.reciprocal().item() >= torch.finfo(torch.float32).tiny


def test_static_scale_never_moves_but_counts_overflows_in_a_row() -> None:
    scaler = Scaler(LossScale.static(1024.0), CPU)
    for overflow in (True, True, False, True):
        step(scaler, overflow)
    assert scaler.scale.item() == 1024.0
    assert scaler.consecutive.item() == 1


def test_hysteresis_waits_for_that_many_overflows_in_a_row_and_a_good_step_refills_it() -> None:
    scaler = Scaler(LossScale(init_scale=64.0, hysteresis=3), CPU)
    scales = []
    for overflow in (True, True, False, True, True, True, True):
        step(scaler, overflow)
        scales.append(scaler.scale.item())
    assert scales == [64, 64, 64, 64, 64, 32, 16]


def test_consecutive_counts_only_overflows_at_the_lowest_scale() -> None:
    scaler = Scaler(LossScale(init_scale=4.0), CPU)
    counts = []
    for overflow in (True, True, True, True, False, True):
        step(scaler, overflow)
        counts.append(int(scaler.consecutive))
    assert counts == [0, 0, 1, 2, 0, 1]


def test_an_update_replaces_the_scale_so_that_a_border_keeps_the_one_it_was_built_with() -> None:
    scaler = Scaler(LossScale(init_scale=64.0), CPU)
    before = scaler.scale
    step(scaler, True)
    assert before.item() == 64.0 and scaler.scale.item() == 32.0


def test_several_backwards_before_one_step_count_as_one_overflow() -> None:
    scaler = Scaler(LossScale(init_scale=64.0), CPU)
    for overflow in (True, True, False):
        backward(scaler, overflow)
    scaler.update(ONE, ONE)
    assert scaler.scale.item() == 32.0


def test_overflow_forgotten_by_the_step_stays_due_for_the_scale() -> None:
    scaler = Scaler(LossScale(init_scale=64.0), CPU)
    backward(scaler, overflow=True)
    backward(scaler)
    scaler.update(ZERO, ZERO)
    assert scaler.scale.item() == 32.0


def test_a_step_taken_inside_backward_does_not_count_one_overflow_twice() -> None:
    scaler = Scaler(LossScale(init_scale=64.0, growth_interval=1), CPU)
    backward(scaler, overflow=True, task=1)
    scaler.update(ONE, ONE)  # the first parameter's optimizer, in a hook
    scaler.seen.fill_(1.0)  # a later layer's gradients come back, of the same backward
    backward(scaler, task=2)
    scaler.update(ZERO, ZERO)
    assert scaler.scale.item() == 64.0  # one backoff, one growth


def test_an_overflow_after_a_good_step_inside_backward_is_due_at_the_next() -> None:
    scaler = Scaler(LossScale(init_scale=64.0), CPU)
    backward(scaler, task=1)
    scaler.update(ZERO, ZERO)
    scaler.seen.fill_(1.0)
    backward(scaler, task=2)
    scaler.update(ZERO, ZERO)
    assert scaler.scale.item() == 32.0


def test_lowering_for_another_models_step_counts_no_step_and_does_not_repeat() -> None:
    scaler = Scaler(LossScale(init_scale=64.0, growth_interval=1), CPU)
    backward(scaler, overflow=True, task=1)
    scaler.lower()
    scaler.lower()
    assert scaler.scale.item() == 32.0
    scaler.update(ONE, ONE)
    assert scaler.scale.item() == 32.0
    backward(scaler, task=2)
    scaler.lower()
    assert scaler.scale.item() == 32.0  # another model's good step is not this model's
    scaler.update(ZERO, ZERO)
    assert scaler.scale.item() == 64.0


def test_backwards_that_are_not_announced_count_each_for_itself() -> None:
    # Compiled graphs write `seen` and set `touched`, and never call `begin`.
    scaler = Scaler(LossScale(init_scale=64.0), CPU)
    for _ in range(2):
        scaler.touched = True
        scaler.seen.fill_(1.0)
        scaler.update(ZERO, ONE)
    assert scaler.scale.item() == 16.0


def test_skip_for_another_models_sake_is_neither_good_nor_bad() -> None:
    scaler = Scaler(LossScale(init_scale=64.0, growth_interval=1), CPU)
    backward(scaler)
    scaler.update(ZERO, ONE)
    assert scaler.scale.item() == 64.0 and scaler.growth_tracker.item() == 0


def test_state_dict_round_trip_continues_alike() -> None:
    config = LossScale(init_scale=64.0, growth_interval=3, hysteresis=2)
    scaler, resumed = Scaler(config, CPU), Scaler(config, CPU)
    for overflow in (False, True, False, False):
        step(scaler, overflow)
    resumed.load_state_dict(scaler.state_dict())
    for overflow in (True, False, False, False, True, True):
        step(scaler, overflow)
        step(resumed, overflow)
        assert scaler.state_dict() == resumed.state_dict()


def test_state_of_a_grad_scaler_loads() -> None:
    theirs = GradScaler("cpu", init_scale=2.0**12, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    theirs.scale(ONE)
    scaler = Scaler(LossScale(hysteresis=2), CPU)
    scaler.load_state_dict({**theirs.state_dict(), "_growth_tracker": 5})
    assert scaler.scale.item() == 2.0**12 and scaler.growth_tracker.item() == 5
    expected = LossScale(2.0**12, growth_factor=3.0, backoff_factor=0.25, growth_interval=7, hysteresis=2)
    assert scaler.config == expected


def test_state_outside_todays_bounds_widens_them() -> None:
    scaler = Scaler(LossScale(init_scale=64.0, min_scale=16.0, max_scale=128.0), CPU)
    scaler.load_state_dict({"scale": 2.0, "_growth_tracker": 0})
    assert scaler.scale.item() == 2.0 and scaler.config.min_scale == 2.0


def test_a_setting_from_a_newer_version_is_left_out() -> None:
    scaler = Scaler(LossScale(), CPU)
    state = scaler.state_dict()
    state["config"]["invented_later"] = 1
    scaler.load_state_dict(state)
    assert scaler.config == LossScale()


@pytest.mark.parametrize(
    "state", [{"lr": 0.1}, {"scale": "big", "_growth_tracker": 0}, {"scale": 0.0, "_growth_tracker": 0}]
)
def test_a_wrong_state_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    scaler = Scaler(LossScale(init_scale=64.0), CPU)
    before = scaler.state_dict()
    with pytest.raises(PolicyError) as caught:
        scaler.load_state_dict(state)
    assert "Received: " in str(caught.value) and "Remedy: " in str(caught.value)
    assert scaler.state_dict() == before


def test_state_dict_is_plain_numbers() -> None:
    state = Scaler(LossScale(), CPU).state_dict()
    assert {type(value) for value in state.values()} <= {int, float, bool, dict}
    assert state["config"] == dataclasses.asdict(LossScale())
