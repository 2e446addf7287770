"""Every optimizer of torch in each of its forms trains as in float32, and an overflow leaves no trace in it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wrapprec
from wrapprec import LossScale

POLICIES = ["16-mixed", "16-module", "bf16-mixed", "bf16-module"]

Build = Callable[[Any], torch.optim.Optimizer]

# Settings at which 20 steps move the weights by much more than rounding does.
DENSE: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], list[str]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}, ["for-loop", "foreach", "fused"]),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}, ["for-loop", "foreach", "fused"]),
    "SGD dampened": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.1}, ["for-loop", "fused"]),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}, ["for-loop", "fused"]),
    "Adam": (torch.optim.Adam, {"lr": 0.01}, ["for-loop", "foreach", "fused"]),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, ["for-loop", "foreach", "fused"]),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}, ["for-loop", "foreach", "fused"]),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.003, "momentum": 0.5}, ["for-loop", "foreach"]),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}, ["for-loop", "foreach", "fused"]),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}, ["for-loop", "foreach"]),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}, ["for-loop", "foreach"]),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}, ["for-loop", "foreach"]),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}, ["for-loop", "foreach"]),
    "ASGD": (torch.optim.ASGD, {"lr": 0.05}, ["for-loop", "foreach"]),
    "Rprop": (torch.optim.Rprop, {"lr": 0.003}, ["for-loop", "foreach"]),
    "Muon": (torch.optim.Muon, {"lr": 0.01}, ["for-loop"]),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}, ["for-loop", "foreach"]),
    "LBFGS": (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}, ["for-loop"]),
    "LBFGS wolfe": (torch.optim.LBFGS, {"max_iter": 2, "line_search_fn": "strong_wolfe"}, ["for-loop"]),
}
FORMS = [(name, form) for name, (_, _, forms) in DENSE.items() for form in forms]


def build(name: str, form: str, params: Any) -> torch.optim.Optimizer:
    kind, settings, _ = DENSE[name]
    forms = {} if form == "for-loop" and name in ("Muon", "LBFGS", "LBFGS wolfe") else {"foreach": form == "foreach"}
    if form == "fused":
        forms = {"fused": True}
    return kind(params, **settings, **forms)


class Net(nn.Module):
    """Two matrices without biases, because Muon takes nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    x = torch.randn(16, 4)
    return x, x[:, :3].sin()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, factor: float = 1.0) -> Tensor:
    """The plain loop; `factor` spoils the loss."""
    x, y = data()
    loss = torch.zeros(())

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.mse_loss(model(x), y) * factor
        value.backward()
        return value

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            loss = optimizer.step(closure)
        else:
            loss = closure()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
    return loss.detach()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_twenty_steps_follow_float32(name: str, form: str, policy: str) -> None:
    model, reference = Net(), Net()
    start = flat(reference)
    optimizer, theirs = (build(name, form, m.parameters()) for m in (model, reference))
    wrapprec.wrap(model, optimizer, policy, **({"loss_scale": 2.0**12} if policy.startswith("16") else {}))
    loss, expected = train(model, optimizer, 20), train(reference, theirs, 20)
    moved = (flat(reference) - start).norm()
    off = (flat(model) - flat(reference)).norm()
    # Optimizers that look at a gradient's sign (Rprop, and Adam's kin while gradients are small) turn a rounding of
    # 2**-9 (bfloat16) or 2**-12 (float16) into steps of full size where a gradient is near zero.
    bound = 0.35 if policy.startswith("bf16") else 0.1
    assert moved > 0.05 and off < bound * moved, f"moved {moved:.3f}, off by {off:.4f}"
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0.2)


@pytest.mark.parametrize("policy", POLICIES)
def test_sparse_adam_follows_float32(policy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    reference = copy.deepcopy(model)
    optimizer, theirs = (torch.optim.SparseAdam(m.parameters(), lr=0.05) for m in (model, reference))
    handle = wrapprec.wrap(model, optimizer, policy)
    tokens = torch.tensor([1, 3, 3, 7])
    for step in range(20):
        for m, o in ((model, optimizer), (reference, theirs)):
            o.zero_grad()
            (m(tokens) - 1.0).square().mean().backward()
            if step == 5 and m is model and policy.startswith("16"):
                skips = model[0].weight.detach().clone(), copy.deepcopy(o.state_dict())
                model[0].weight.grad._values()[0, 0] = math.inf
                o.step()
                assert handle.step_was_skipped and torch.equal(model[0].weight, skips[0])
                same(o.state_dict(), skips[1])
                o.zero_grad()
                (m(tokens) - 1.0).square().mean().backward()
            assert m[0].weight.grad.is_sparse
            o.step()
    # 20 steps of 0.05 in the gradient's sign: rounding moves nothing but the last digits.
    torch.testing.assert_close(model[0].weight, reference[0].weight, atol=0.02, rtol=0)


def same(left: Any, right: Any) -> None:
    """Assert that two states are equal to the bit; a state that is all zeros is as good as none."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        for key in left.keys() | right.keys():
            if key not in left or key not in right:
                assert _nothing(left.get(key, right.get(key))), key
            else:
                same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            same(a, b)
    else:
        assert left == right


def _nothing(state: Any) -> bool:
    values = state.values() if isinstance(state, dict) else [state]
    return all(value is None or not torch.as_tensor(value).any() for value in values)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_an_overflow_leaves_parameters_state_and_counters_as_they_were(
    name: str, form: str, static: bool, at: int
) -> None:
    model = Net()
    optimizer = build(name, form, model.parameters())
    scale = LossScale.static(64.0) if static else LossScale(init_scale=64.0, min_scale=16.0)
    handle = wrapprec.wrap(model, optimizer, "16-module", loss_scale=scale)
    train(model, optimizer, at)
    weights, state = flat(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 1, factor=math.inf)
    assert handle.step_was_skipped and handle.skipped_steps == 1
    assert torch.equal(flat(model), weights)
    same(optimizer.state_dict(), state)
    closure = isinstance(optimizer, torch.optim.LBFGS)  # which evaluates again, down to the lowest scale
    assert handle.scale == (64.0 if static else 16.0 if closure else 32.0)
    # ... and the run goes on as if the overflow had never been.
    twin = Net()
    other = build(name, form, twin.parameters())
    wrapprec.wrap(twin, other, "16-module", loss_scale=64.0)
    train(twin, other, at)
    train(twin, other, 3)
    train(model, optimizer, 3)
    if static:
        assert torch.equal(flat(model), flat(twin))


# Parameters that come later, and what does nothing


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_added_by_add_param_group_are_guarded_from_then_on(fused: bool) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.one.parameters(), lr=0.01, fused=fused)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0)
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": list(model.two.parameters()), "lr": 0.1})
    before = model.two.weight.detach().clone()
    model.zero_grad()
    train(model, optimizer, 1, factor=math.inf)
    assert handle.step_was_skipped and torch.equal(model.two.weight, before)
    train(model, optimizer, 1)
    assert not handle.step_was_skipped and not torch.equal(model.two.weight, before)


def test_a_parameter_exchanged_for_another_is_guarded_too() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.one.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["params"] = list(model.two.parameters())
    before = model.two.weight.detach().clone()
    model.zero_grad()
    train(model, optimizer, 1, factor=math.inf)
    assert handle.step_was_skipped and torch.equal(model.two.weight, before)


def test_disabled_wrapping_does_nothing_at_all() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    modules, own = [dict(m.__dict__) for m in model.modules()], dict(optimizer.__dict__)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", scheduler=scheduler, enabled=False)
    assert [m.__dict__ for m in model.modules()] == modules
    assert wrapprec.handle_of(model) is None
    assert handle.scale == 1.0 and not handle.step_was_skipped and handle.skipped_steps == 0
    handle.attach(optimizer)
    handle.load_state_dict(handle.state_dict())
    assert {k: v for k, v in optimizer.__dict__.items() if k != "step"}.keys() == {k for k in own if k != "step"}
    handle.unwrap()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_optimizer_attached_later_trains_and_skips(policy: str) -> None:
    model, reference = Net(), Net()
    handle = wrapprec.wrap(model, policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapprec.handle_of(model).attach(optimizer)
    assert wrapprec.handle_of(model.one) is handle
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05)
    train(model, optimizer, 20), train(reference, theirs, 20)
    # 20 steps of 0.05: bfloat16's 2**-9 of each.
    torch.testing.assert_close(flat(model), flat(reference), atol=0.01, rtol=0.01)
    if policy.startswith("16"):
        before = flat(model)
        train(model, optimizer, 1, factor=math.inf)
        assert torch.equal(flat(model), before) and handle.step_was_skipped
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle.attach(optimizer)  # twice does nothing more
        train(model, optimizer, 1, factor=math.inf)
        assert handle.skipped_steps == 2


def test_a_users_own_grad_scaler_around_a_fused_optimizer_composes() -> None:
    model, reference = Net(), Net()
    optimizer, theirs = (torch.optim.AdamW(m.parameters(), lr=0.01, fused=True) for m in (model, reference))
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=64.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    x, y = data()
    for step in range(10):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y) * (math.inf if step == 4 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 4:
            theirs.zero_grad()
            F.mse_loss(reference(x), y).backward()
            theirs.step()
    assert scaler.get_scale() == 64.0
    # ten steps of 0.01 in the gradient's sign
    torch.testing.assert_close(flat(model), flat(reference), atol=0.01, rtol=0)
