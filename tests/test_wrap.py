"""`wrap`, `unwrap` and `handle_of`: the plain loop, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wrapprec
from wrapprec import AlreadyWrappedError, PolicyError, WrapprecWarning

POLICIES = ["16-mixed", "16-module", "bf16-mixed", "bf16-module"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> list[float]:
    """The loop of the README, word for word."""
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 4)
        y = x.argmax(dim=1).clamp(max=2)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("policy", POLICIES)
def test_the_five_lines_train_as_in_float32(policy: str) -> None:
    model, reference = net(), net()
    optimizer, theirs = (torch.optim.SGD(m.parameters(), lr=0.2) for m in (model, reference))
    wrapprec.wrap(model, optimizer, policy, **({"loss_scale": 1024.0} if policy.startswith("16") else {}))
    found, expected = loop(model, optimizer), loop(reference, theirs)
    # bfloat16 rounds to 2**-9, float16 to 2**-12; the loss is of order one.
    tolerance = 0.03 if policy.startswith("bf16") else 0.004
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=tolerance, rtol=0)
    assert expected[-1] < expected[0]


def test_full_precision_is_bit_identical_to_unwrapped() -> None:
    model, reference = net(), net()
    optimizer, theirs = (torch.optim.AdamW(m.parameters()) for m in (model, reference))
    wrapprec.wrap(model, optimizer, "32-true")
    assert loop(model, optimizer) == loop(reference, theirs)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_after_unwrap_the_loop_is_bit_identical_to_one_never_wrapped(policy: str) -> None:
    model, reference = net(), net()
    optimizer, theirs = (torch.optim.AdamW(m.parameters()) for m in (model, reference))
    handle = wrapprec.wrap(model, optimizer, policy)
    with torch.no_grad():
        model(torch.ones(1, 4))
    handle.unwrap()
    assert loop(model, optimizer) == loop(reference, theirs)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": 3}, "Expected model to be a torch.nn.Module, or a sequence of them"),
        ({"model": []}, "Expected at least one model"),
        ({"model": nn.Linear(1, 1), "optimizer": "sgd"}, "Expected optimizer to be a torch.optim.Optimizer"),
        ({"model": nn.Linear(1, 1), "optimizer": []}, "Expected at least one optimizer"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError) as caught:
        wrapprec.wrap(policy="bf16-mixed", **arguments)
    assert str(caught.value).startswith(text)
    assert "Received: " in str(caught.value) and "Remedy: " in str(caught.value)


@pytest.mark.parametrize("failing", ["second model", "scheduler", "optimizer"])
def test_a_failure_half_way_leaves_nothing_behind(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = net(), net()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    before = [dict(m.__dict__) for m in (*first.modules(), *second.modules())]
    own, theirs = dict(optimizer.__dict__), dict(scheduler.__dict__)
    if failing == "second model":
        wrapped = wrapprec.wrap(second[0], policy="16-mixed")
        with pytest.raises(AlreadyWrappedError):
            wrapprec.wrap([first, second], optimizer, "16-mixed", scheduler=scheduler)
        wrapped.unwrap()
    else:
        target = "wrapprec.hold.Hold.install" if failing == "scheduler" else "wrapprec.step.Stepper.install"

        def fail(*_: Any) -> None:
            raise OSError("no more")

        monkeypatch.setattr(target, fail)
        with pytest.raises(OSError, match="no more"):
            wrapprec.wrap([first, second], optimizer, "16-mixed", scheduler=scheduler)
    assert [m.__dict__ for m in (*first.modules(), *second.modules())] == before
    assert {k: v for k, v in optimizer.__dict__.items() if v or k in own} == own
    assert scheduler.__dict__ == theirs
    assert wrapprec.handle_of(first) is None
    wrapprec.wrap([first, second], policy="16-mixed").unwrap()


def test_a_policy_that_does_not_fit_changes_nothing() -> None:
    model = net()
    before = [dict(m.__dict__) for m in model.modules()]
    for policy in ("params=float64,compute=float32", "no such policy"):
        with pytest.raises(PolicyError):
            wrapprec.wrap(model, policy=policy)
    with pytest.raises(PolicyError):
        wrapprec.wrap(model, policy="bf16-mixed", rules=[("no.such.module", "float32")])
    assert [m.__dict__ for m in model.modules()] == before


def test_wrapping_twice_is_refused_until_unwrapped() -> None:
    model = net()
    handle = wrapprec.wrap(model, policy="bf16-mixed")
    for part in (model, model[0], nn.Sequential(model)):
        with pytest.raises(AlreadyWrappedError, match="wrap once"):
            wrapprec.wrap(part, policy="bf16-mixed")
    handle.unwrap()
    wrapprec.wrap(model, policy="bf16-mixed")


def test_handle_of_finds_the_handle_from_every_part_and_from_around() -> None:
    model = net()
    assert wrapprec.handle_of(model) is None
    handle = wrapprec.wrap(model, policy="bf16-mixed")
    for part in (model, model[0], model[1], nn.ModuleList([model])):
        assert wrapprec.handle_of(part) is handle


def test_unwrap_undoes_the_whole_call_from_any_part() -> None:
    models = [net(), net()]
    wrapprec.wrap(models, policy="16-mixed")
    wrapprec.unwrap(models[1][0])
    assert all(wrapprec.handle_of(model) is None for model in models)


def test_a_deep_copy_has_a_handle_of_its_own() -> None:
    model = net()
    handle = wrapprec.wrap(model, policy="16-mixed", loss_scale=wrapprec.LossScale(64.0))
    twin = copy.deepcopy(model)
    other = wrapprec.handle_of(twin)
    assert other is not None and other is not handle
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    other.attach(optimizer)
    (twin(torch.ones(1, 4)).sum() * float("inf")).backward()
    optimizer.step()
    assert other.scale == 32.0 and handle.scale == 64.0
    wrapprec.unwrap(twin)
    assert wrapprec.handle_of(twin) is None and wrapprec.handle_of(model) is handle


def test_models_and_optimizers_may_be_lists_and_share_parameters_freely() -> None:
    models = [net(), net()]
    with pytest.warns(WrapprecWarning, match="no wrapped model owns"):
        wrapprec.wrap(
            models,
            [
                torch.optim.SGD([*models[0].parameters(), *models[1].parameters()], lr=0.1),
                torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),
            ],
            "16-mixed",
        )


@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed,init_scale=64", "bf16-module", "bf16-true"])
def test_model_whose_class_has_another_meaning_of_parameters_is_wrapped(policy: str) -> None:
    class Groups(nn.Sequential):
        def parameters(self, lr: float) -> Any:  # type: ignore[override]
            return [{"params": part.parameters(), "lr": lr} for part in self]

    model = Groups(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(0.5))
    handle = wrapprec.wrap(model, optimizer, policy)
    before = [part.weight.detach().clone() for part in model]
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(part.weight, old) for part, old in zip(model, before, strict=True))
    assert handle.skipped_steps == 0
    handle.unwrap()
    assert model(torch.ones(2, 4)).dtype is torch.float32
