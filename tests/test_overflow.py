"""Overflow: seen in backward and at the step, skipped without a trace, counted once, for the right model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wrapprec
from wrapprec import LossScale, NonFiniteError, StepError

POLICIES = ["16-mixed", "16-module"]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def dynamic(init: float = 64.0, **settings: Any) -> LossScale:
    return LossScale(init_scale=init, **settings)


def run_backward(model: nn.Module, bad: bool = False) -> None:
    (model(torch.ones(2, 3)).square().mean() * (math.inf if bad else 1.0)).backward()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Limit(torch.autograd.Function):
    """Identity; in backward what exceeds `limit` overflows, as in float16 but at a size of the test's choice."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where(grad.abs() > ctx.limit, math.inf, grad), None


class Narrow(nn.Module):
    """A model whose inner gradients overflow above `limit`: whether they do depends on the loss scale."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.inner, self.outer, self.limit = nn.Linear(3, 4), nn.Linear(4, 1), limit

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(Limit.apply(self.inner(x), self.limit))


# Seen


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fused", [False, True])
def test_overflow_that_clip_grad_value_hides_is_skipped_nevertheless(policy: str, fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    handle = wrapprec.wrap(model, optimizer, policy, loss_scale=dynamic())
    before = values(model)
    run_backward(model, bad=True)
    for param in model.parameters():
        param.grad = param.grad.nan_to_num(0.0)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert unchanged(model, before) and handle.step_was_skipped and handle.scale == 32.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_inf_that_the_user_puts_into_a_gradient_is_skipped_and_lowers_the_scale(fused: bool, bad: float) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=dynamic())
    before = values(model)
    run_backward(model)
    model[0].weight.grad[0, 0] = bad
    optimizer.step()
    assert unchanged(model, before) and handle.step_was_skipped and handle.scale == 32.0
    optimizer.zero_grad()
    run_backward(model)
    optimizer.step()
    assert not unchanged(model, before) and not handle.step_was_skipped and handle.scale == 32.0


@pytest.mark.parametrize("policy", POLICIES)
def test_overflow_inside_the_model_alone_is_seen(policy: str) -> None:
    torch.manual_seed(0)
    model = Narrow(limit=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, policy, loss_scale=dynamic(1024.0))
    scales = []
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        assert handle.scale == (scales[-1] if scales else 1024.0)
        optimizer.step()
        scales.append(handle.scale)
    assert scales[0] == 512.0 and scales[-1] == scales[-2] < 64.0
    assert handle.skipped_steps == int(math.log2(1024.0 / scales[-1]))


# Two optimizers


def test_two_optimizers_on_one_model_skip_only_where_their_parameters_overflowed() -> None:
    torch.manual_seed(0)
    model = Narrow(limit=0.01)
    inner = torch.optim.SGD(model.inner.parameters(), lr=0.1)
    outer = torch.optim.Adam(model.outer.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, [inner, outer], "16-mixed", loss_scale=dynamic())
    kept, stepped = values(model.inner), values(model.outer)
    model(torch.ones(2, 3)).sum().backward()
    inner.step()
    assert handle.step_was_skipped
    outer.step()
    assert not handle.step_was_skipped
    assert unchanged(model.inner, kept) and not unchanged(model.outer, stepped)
    assert handle.scale == 32.0 and handle.skipped_steps == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_scale_changes_at_most_once_between_two_backwards(order: tuple[int, int]) -> None:
    model = net()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    handle = wrapprec.wrap(model, optimizers, "16-module", loss_scale=dynamic(growth_interval=1))
    seen = []
    for bad in (True, False, False, True):
        run_backward(model, bad)
        for i in order:
            optimizers[i].step()
        optimizers[0].step()
        seen.append(handle.scale)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert seen == [32.0, 64.0, 128.0, 64.0]


def test_a_parameter_of_two_optimizers_is_skipped_by_both() -> None:
    model = net()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    handle = wrapprec.wrap(model, optimizers, "16-mixed", loss_scale=dynamic())
    before = values(model)
    run_backward(model, bad=True)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    assert unchanged(model, before) and handle.skipped_steps == 2 and handle.scale == 32.0


def test_parameters_that_no_optimizer_steps_do_not_stop_the_loop() -> None:
    # A head is trained on a backbone that nobody froze.
    model = net()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=dynamic())
    for bad in (False, True, True, False):
        optimizer.zero_grad()
        run_backward(model, bad)
        optimizer.step()
    assert handle.scale == 16.0 and handle.skipped_steps == 2


# Forgetting


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["none", "zero", "module", "by hand"])
def test_dropped_gradients_forget_the_skip_but_the_backoff_stays_due(how: str, fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=dynamic())
    before = values(model)
    run_backward(model, bad=True)
    if how == "module":
        model.zero_grad()
    elif how == "by hand":
        for param in model.parameters():
            param.grad = None
    else:
        optimizer.zero_grad(set_to_none=how == "none")
    run_backward(model)
    optimizer.step()
    assert not handle.step_was_skipped and not unchanged(model, before)
    assert handle.scale == 32.0


def test_an_abandoned_backward_is_forgotten_at_the_next_zero_grad() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=dynamic())
    with pytest.raises(RuntimeError, match="stopped"):
        model[0].weight.register_hook(_stop)
        run_backward(model, bad=True)
    model[0].weight._backward_hooks.clear()
    optimizer.zero_grad()
    before = values(model)
    run_backward(model)
    optimizer.step()
    assert not unchanged(model, before) and not handle.step_was_skipped


def _stop(grad: Tensor) -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_without_gradients_is_an_ordinary_step_and_moves_no_scale(fused: bool) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=dynamic(growth_interval=1))
    before = values(model)
    optimizer.step()
    run_backward(model, bad=True)
    optimizer.zero_grad()
    optimizer.step()  # takes the backoff that is due, and steps nothing
    assert not handle.step_was_skipped
    optimizer.step()
    assert unchanged(model, before) and handle.scale == 32.0 and handle.skipped_steps == 0


OPERATIONS = ["good", "bad", "step", "zero", "zeros", "drop"]


@pytest.mark.parametrize("fused", [False, True])
def test_every_sequence_of_operations_follows_the_reference(fused: bool) -> None:
    @given(st.lists(st.sampled_from(OPERATIONS), max_size=14), st.integers(1, 2), st.integers(1, 2))
    @settings(max_examples=120)
    def check(operations: list[str], interval: int, hysteresis: int) -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.Adam(model.parameters(), fused=fused)
        config = dynamic(8.0, growth_interval=interval, hysteresis=hysteresis, max_scale=64.0)
        handle = wrapprec.wrap(model, optimizer, "16-module", loss_scale=config)
        # The reference: what GradScaler would do, had it been told of every overflow when it happened.
        scale, tracker, row, skips = 8.0, 0, 0, 0
        fresh = due = recorded = in_grad = False
        for operation in operations:
            if operation in ("good", "bad"):
                bad = operation == "bad"
                (model(torch.ones(1, 2)).mean() * (math.inf if bad else 1.0)).backward()
                fresh, due, recorded, in_grad = True, due or bad, recorded or bad, in_grad or bad
            elif operation == "step":
                skip = recorded or in_grad
                if fresh and (due or in_grad):
                    tracker, row = 0, row + 1
                    if row >= hysteresis:
                        scale = max(scale * 0.5, 1.0)
                elif fresh and not skip:
                    tracker, row = tracker + 1, 0
                    if tracker == interval:
                        scale, tracker = min(scale * 2.0, 64.0), 0
                skips += skip
                before = values(model)
                optimizer.step()
                assert handle.step_was_skipped == skip
                assert not skip or unchanged(model, before)
                fresh = due = recorded = False
            else:
                if operation == "drop":
                    for param in model.parameters():
                        param.grad = None
                else:
                    optimizer.zero_grad(set_to_none=operation == "zero")
                recorded = in_grad = False
            assert handle.scale == scale and handle.skipped_steps == skips
        handle.unwrap()

    check()


# No patched step


def test_overflow_without_an_optimizer_raises_at_the_next_forward_naming_attach() -> None:
    model = net()
    handle = wrapprec.wrap(model, policy="16-mixed", loss_scale=dynamic())
    run_backward(model)
    run_backward(model, bad=True)
    with pytest.raises(StepError, match=r"handle\.attach") as caught:
        model(torch.ones(2, 3))
    assert "Received: " in str(caught.value) and handle.scale == 32.0
    run_backward(model)  # raised once


def test_overflow_stepped_by_a_rebuilt_optimizer_raises_at_the_next_forward() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=dynamic())
    rebuilt = torch.optim.Adam(model.parameters())
    for bad in (False, True):
        rebuilt.zero_grad()
        run_backward(model, bad)
        rebuilt.step()
    with pytest.raises(StepError, match=r"handle\.attach"):
        model(torch.ones(2, 3))


def test_overflow_stepped_next_to_a_patched_optimizer_raises_too() -> None:
    for first in (True, False):
        model = net()
        known = torch.optim.SGD(model[0].parameters(), lr=0.1)
        wrapprec.wrap(model, known, "16-mixed", loss_scale=dynamic())
        unknown = torch.optim.SGD(model[2].parameters(), lr=0.1)
        run_backward(model, bad=True)
        for optimizer in (known, unknown) if first else (unknown, known):
            optimizer.step()
        with pytest.raises(StepError, match=r"handle\.attach"):
            model(torch.ones(2, 3))


def test_overflow_stepped_by_a_copied_optimizer_raises_at_the_copys_next_forward() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=dynamic())
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    run_backward(twin, bad=True)
    its_optimizer.step()
    with pytest.raises(StepError, match=r"handle\.attach"):
        twin(torch.ones(2, 3))
    assert handle.scale == 64.0  # a copy has its own scale
    wrapprec.handle_of(twin).attach(its_optimizer)
    its_optimizer.zero_grad()
    twin.load_state_dict(model.state_dict())
    before = values(twin)
    run_backward(twin, bad=True)
    its_optimizer.step()
    assert unchanged(twin, before)


# Other models


class Nets:
    """A generator and a discriminator whose gradients overflow inside it."""

    def __init__(self, limit: float) -> None:
        torch.manual_seed(0)
        self.g, self.d = nn.Linear(3, 3), Narrow(limit)

    def step_g(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.d(self.g(torch.ones(2, 3))).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["one call", "two calls", "frozen", "no optimizer"])
def test_a_generator_step_lowers_the_scale_of_the_discriminator_that_overflowed(how: str) -> None:
    nets = Nets(limit=0.01)
    scale = dynamic()
    opt_g = torch.optim.SGD(nets.g.parameters(), lr=0.1)
    opt_d = torch.optim.SGD(nets.d.parameters(), lr=0.1)
    if how == "one call":
        handle = wrapprec.wrap([nets.g, nets.d], [opt_g, opt_d], "16-mixed", loss_scale=scale)
    else:
        wrapprec.wrap(nets.g, opt_g, "16-mixed", loss_scale=scale)
        wrapprec.wrap(nets.d, opt_d if how == "two calls" else None, "16-mixed", loss_scale=scale)
        handle = wrapprec.handle_of(nets.d)
    if how == "frozen":
        nets.d.requires_grad_(False)
    before = values(nets.g)
    nets.step_g(opt_g)
    assert unchanged(nets.g, before)
    assert handle.scales[-1] == 32.0
    opt_d.zero_grad()
    nets.step_g(opt_g)
    assert handle.scales[-1] == 16.0
    if how in ("one call", "two calls"):
        opt_d.zero_grad()
        nets.d.outer(torch.ones(2, 4)).sum().backward()
        opt_d.step()
        assert handle.scales[-1] == 16.0 and not handle.step_was_skipped


def test_a_generators_good_step_is_no_good_step_of_the_discriminator() -> None:
    nets = Nets(limit=math.inf)
    opt_g = torch.optim.SGD(nets.g.parameters(), lr=0.1)
    opt_d = torch.optim.SGD(nets.d.parameters(), lr=0.1)
    scale = dynamic(growth_interval=1)
    handle = wrapprec.wrap([nets.g, nets.d], [opt_g, opt_d], "16-mixed", loss_scale=scale)
    nets.step_g(opt_g)
    assert handle.scales == (128.0, 64.0)


# Giving up


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("static", [False, True])
def test_the_last_of_max_consecutive_skips_raises(most: int, fused: bool, static: bool) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scale = LossScale(1.0, max_consecutive_skips=most, dynamic=not static)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=scale)
    before = values(model)
    skips = 0
    with pytest.raises(NonFiniteError) as caught:
        for _ in range(300):
            optimizer.zero_grad()
            run_backward(model, bad=True)
            optimizer.step()
            skips += 1
    # Fused kernels skip on the device: the count is looked at every hundred steps.
    assert skips == most - 1 if not fused else skips <= 101
    assert "Received: " in str(caught.value) and 'module "2" (Linear)' in str(caught.value)
    assert unchanged(model, before) and handle.skipped_steps == skips + 1


def test_skips_above_the_lowest_scale_are_no_reason_to_give_up() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=dynamic(64.0, max_consecutive_skips=1))
    skips = 0
    with pytest.raises(NonFiniteError):
        for _ in range(20):
            run_backward(model, bad=True)
            optimizer.step()
            skips += 1
    assert skips == 6  # from 64 down to 1; the seventh raises


def test_a_good_step_in_between_starts_the_count_again() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(1.0, max_consecutive_skips=3))
    for bad in [True, True, False] * 4:
        optimizer.zero_grad()
        run_backward(model, bad)
        optimizer.step()


def test_asking_the_handle_twice_makes_no_diagnosis_up() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(1.0, max_consecutive_skips=2))
    for _ in range(4):
        optimizer.zero_grad()
        run_backward(model, bad=True)
        optimizer.step()
    assert [handle.skipped_steps for _ in range(3)] == [4, 4, 4]
    assert handle.state_dict()["skipped_steps"] == 4
    optimizer.zero_grad()
    run_backward(model, bad=True)
    with pytest.raises(NonFiniteError, match="forward is finite, but the gradient of"):
        optimizer.step()


# Inside backward


@pytest.mark.parametrize("policy", POLICIES)
def test_optimizers_that_step_inside_backward_skip_and_count_once(policy: str) -> None:
    model = net()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    handle = wrapprec.wrap(model, list(optimizers.values()), policy, loss_scale=dynamic(growth_interval=1))

    def step(param: nn.Parameter) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    scales = []
    for bad in (True, False, False, True, True):
        before = values(model)
        run_backward(model, bad)
        assert unchanged(model, before) == bad
        scales.append(handle.scale)
    assert scales == [32.0, 64.0, 128.0, 64.0, 32.0]


def test_optimizers_inside_backward_use_true_gradients() -> None:
    model, reference = net(), net()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    wrapprec.wrap(model, list(optimizers.values()), "16-mixed", loss_scale=1024.0)

    def step(param: nn.Parameter) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(5):
        run_backward(model)
        theirs.zero_grad()
        run_backward(reference)
        theirs.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        # float16 rounds to 2**-11; five steps of at most 0.1 each time a gradient of order one.
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
