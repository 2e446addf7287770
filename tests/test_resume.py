"""A resumed run is bit-identical to one that was never interrupted, and a forgotten scale is noticed."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import wrapprec
from wrapprec import LossScale, PolicyError, WrapprecWarning

SCALE = LossScale(init_scale=2.0**10, growth_interval=3, hysteresis=2)
# Overflows before and after the checkpoint, alone and in a row; growth on both sides.
BAD = {2, 6, 7, 12, 13, 14}
STEPS, SAVED_AT = 20, 7


def build(policy: str, fused: bool) -> tuple[nn.Module, torch.optim.Optimizer, wrapprec.Handle]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scale = {"loss_scale": SCALE} if policy.startswith("16") else {}
    return model, optimizer, wrapprec.wrap(model, optimizer, policy, **scale)


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, handle: wrapprec.Handle, steps: range
) -> list[tuple[float, float]]:
    seen = []
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (loss * (math.inf if step in BAD else 1.0)).backward()
        if step not in BAD or handle.scale != 1.0:  # without a scale an overflow is the user's own affair
            optimizer.step()
        seen.append((loss.item(), handle.scale))
    return seen


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["16-mixed", "16-module", "bf16-mixed", "bf16-module"])
@pytest.mark.parametrize("saved_at", [1, 3, SAVED_AT, 8, 13])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(policy: str, fused: bool, saved_at: int) -> None:
    whole = build(policy, fused)
    expected = run(*whole, range(STEPS))

    model, optimizer, handle = build(policy, fused)
    first = run(model, optimizer, handle, range(saved_at))
    parts = {"model": model, "optimizer": optimizer, "handle": handle}
    state = through_a_file({name: part.state_dict() for name, part in parts.items()})

    model, optimizer, handle = build(policy, fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WrapprecWarning)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        handle.load_state_dict(state["handle"])
        second = run(model, optimizer, handle, range(saved_at, STEPS))
    assert first + second == expected
    assert handle.skipped_steps == whole[2].skipped_steps
    for p, q in zip(model.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(model.parameters(), whole[0].parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, whole[1].state[q][key])
    assert handle.state_dict() == whole[2].state_dict()


def test_a_run_that_never_overflowed_before_grows_on_time_after_resuming() -> None:
    model, optimizer, handle = build("16-mixed", False)
    run(model, optimizer, handle, range(2))
    state = through_a_file(handle.state_dict())
    assert state["scales"][0]["growth_tracker"] == 2
    _, _, other = build("16-mixed", False)
    other.load_state_dict(state)
    assert other.state_dict() == handle.state_dict()


def test_handle_state_is_plain_numbers_and_strings() -> None:
    def types(value: Any) -> set[type]:
        if isinstance(value, dict):
            return set().union(*(types(v) for v in value.values()))
        return set().union(*(types(v) for v in value)) if isinstance(value, list) else {type(value)}

    assert types(build("16-mixed", False)[2].state_dict()) <= {int, float, bool, str, type(None)}


def test_the_state_of_a_grad_scaler_resumes_a_torch_amp_run() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=5)
    scaler.scale(torch.ones(()))
    state = through_a_file({**scaler.state_dict(), "_growth_tracker": 4})
    model, optimizer, handle = build("16-mixed", False)
    handle.load_state_dict(state)
    assert handle.scale == 2.0**9
    run(model, optimizer, handle, range(1))
    assert handle.scale == 2.0**10  # the fifth good step


def test_the_empty_state_of_a_disabled_grad_scaler_loads() -> None:
    handle = build("16-mixed", False)[2]
    handle.load_state_dict(torch.amp.GradScaler("cpu", enabled=False).state_dict())
    assert handle.scale == 2.0**10


def test_states_pass_between_enabled_and_disabled_handles() -> None:
    handle = build("16-mixed", False)[2]
    model = nn.Linear(2, 2)
    off = wrapprec.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), enabled=False)
    off.load_state_dict(handle.state_dict())
    handle.load_state_dict(off.state_dict())
    assert handle.scale == 2.0**10 and off.scale == 1.0


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad"])
def test_loading_only_the_optimizers_state_warns_once_at_the_next_step(kind: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(4, 2)
        settings = {"momentum": 0.9} if kind == "SGD" else {}
        return model, getattr(torch.optim, kind)(model.parameters(), lr=0.01, **settings)

    model, optimizer = make()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    model, optimizer = make()
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WrapprecWarning)
        optimizer.load_state_dict(state)
    with pytest.warns(WrapprecWarning, match="the loss scale to be restored") as caught:
        run(model, optimizer, handle, range(1))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", WrapprecWarning)
        run(model, optimizer, handle, range(1))


@pytest.mark.parametrize("order", ["before", "after", "before attach"])
def test_no_warning_when_the_scale_was_loaded_too(order: str) -> None:
    model, optimizer, handle = build("16-mixed", False)
    run(model, optimizer, handle, range(2))
    states = optimizer.state_dict(), handle.state_dict()
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = wrapprec.wrap(model, None if order == "before attach" else optimizer, "16-mixed", loss_scale=SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WrapprecWarning)
        if order == "after":
            optimizer.load_state_dict(states[0])
        handle.load_state_dict(states[1])
        if order == "before attach":
            handle.attach(optimizer)
        if order != "after":
            optimizer.load_state_dict(states[0])
        run(model, optimizer, handle, range(2))


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad"])
def test_an_optimizer_that_is_given_its_own_fresh_state_does_not_warn(kind: str) -> None:
    # accelerate's prepare does so with every optimizer.
    model = nn.Linear(4, 2)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WrapprecWarning)
        optimizer.load_state_dict(optimizer.state_dict())
        run(model, optimizer, handle, range(1))


def test_a_state_of_other_models_is_refused() -> None:
    handle = build("16-mixed", False)[2]
    state = handle.state_dict()
    state["scales"] = state["scales"] * 2
    with pytest.raises(PolicyError, match="the state of 1 models"):
        handle.load_state_dict(state)


def test_a_state_that_is_half_wrong_changes_nothing() -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    handle = wrapprec.wrap(models, policy="16-mixed", loss_scale=SCALE)
    state = handle.state_dict()
    state["scales"][0]["scale"] = 4.0
    state["scales"][1] = {"epoch": 3}
    with pytest.raises(PolicyError, match="the state of a loss scale"):
        handle.load_state_dict(state)
    assert handle.scales == (2.0**10, 2.0**10)
