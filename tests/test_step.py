"""The patched step: what it costs, what it leaves on the optimizer, and what it keeps alive."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wrapprec
from wrapprec import LossScale

# Name, settings: every optimizer of torch with a fused form.
FUSED = [("Adam", {}), ("AdamW", {}), ("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})]
OTHERS = [("SGD", {}), ("SGD", {"momentum": 0.9, "foreach": True}), ("Adam", {"foreach": True}), ("RMSprop", {})]


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # item(), float(), bool() and if come here; equal() compares on the host, nonzero() asks for a size.
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    counter = Reads()
    for name in ("tolist", "numpy"):
        real = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            counter.count += 1
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    with counter:
        yield counter
    monkeypatch.undo()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def backward(model: nn.Module, bad: bool = False) -> None:
    (model(torch.ones(2, 3)).square().mean() * (math.inf if bad else 1.0)).backward()


def make(name: str, settings: dict[str, Any], model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(model.parameters(), lr=0.01, **settings, **more)


# Host reads


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize(("name", "settings"), FUSED)
def test_a_fused_step_reads_nothing_on_the_host(
    name: str, settings: dict[str, Any], when: str, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = net(), net()
    optimizer, theirs = make(name, settings, model, fused=True), make(name, settings, plain, fused=True)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(64.0))
    if when == "later":
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    backward(model, bad)
    backward(plain)
    with reads(monkeypatch) as torchs:
        theirs.step()
    with reads(monkeypatch) as counter:
        optimizer.step()
    # torch 2.9's fused Adagrad does not say that it takes a flag, although its kernel does.
    takes_flag = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert takes_flag or (name == "Adagrad" and torch.__version__ < "2.13")
    assert torchs.count == 0 and counter.count == (0 if takes_flag else 1)
    assert handle.step_was_skipped == bad


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize(("name", "settings"), OTHERS)
def test_any_other_step_reads_once_besides_what_torch_reads(
    name: str, settings: dict[str, Any], bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = net(), net()
    optimizer, theirs = make(name, settings, model), make(name, settings, plain)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(64.0))
    for step in range(2):
        optimizer.zero_grad()
        theirs.zero_grad()
        backward(model, bad and step == 1)
        backward(plain)
        with reads(monkeypatch) as torchs:
            theirs.step()
        with reads(monkeypatch) as counter:
            optimizer.step()
        assert counter.count == 1 + (0 if bad and step == 1 else torchs.count)


@pytest.mark.parametrize("fused", [False, True])
def test_a_held_scheduler_costs_one_read_a_step_in_all(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(64.0), scheduler=scheduler)
    for bad in (False, True, False):
        optimizer.zero_grad()
        backward(model, bad)
        with reads(monkeypatch) as counter:
            optimizer.step()
            scheduler.step()
        assert counter.count == 1


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_forward_and_backward_read_nothing(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, policy, loss_scale=LossScale(64.0))
    for bad in (False, True, False):
        with reads(monkeypatch) as counter:
            optimizer.zero_grad()
            backward(model, bad)
        assert counter.count == 0
        optimizer.step()


def test_a_backbone_that_nobody_steps_costs_no_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.Adam(model[2].parameters(), fused=True)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(64.0))
    for _ in range(3):
        with reads(monkeypatch) as counter:
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        assert counter.count == 0


def test_policies_without_a_scale_leave_the_optimizer_alone() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(optimizer.__dict__)
    handle = wrapprec.wrap(model, optimizer, "bf16-mixed")
    assert optimizer.__dict__ == before and not handle.step_was_skipped and handle.scale == 1.0


# What it leaves on the optimizer


@pytest.mark.parametrize("fused", [False, True])
def test_unwrap_leaves_the_optimizer_as_it_was(fused: bool) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    own = {name: copy.copy(value) for name, value in optimizer.__dict__.items()}
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(64.0))
    backward(model, bad=True)
    optimizer.step()
    handle.unwrap()
    for name in ("state",):
        own.pop(name)
    assert optimizer.__dict__.keys() - {"state"} == own.keys()
    assert {name: optimizer.__dict__[name] for name in own} == own


def test_the_return_value_and_the_signature_of_step_stay() -> None:
    import inspect

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    signature = inspect.signature(optimizer.step)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(64.0))
    assert inspect.signature(optimizer.step) == signature and optimizer.step.__name__ == "step"
    assert optimizer.step() is None and optimizer.step(None) is None and optimizer.step(closure=None) is None


def test_step_hooks_of_the_user_run_on_good_steps_only() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ran: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
    optimizer.register_step_post_hook(lambda *_: ran.append("after"))
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(64.0))
    for bad in (True, False):
        optimizer.zero_grad()
        backward(model, bad)
        optimizer.step()
    assert ran == ["before", "after"]


def test_a_wrapped_optimizer_pickles_and_copies_as_a_plain_one() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=LossScale(64.0))
    backward(model)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert "step" not in twin.__dict__
        assert str(twin.state_dict()) == str(optimizer.state_dict())
    torch.save(optimizer.state_dict(), io.BytesIO())


@pytest.mark.parametrize("fused", [False, True])
def test_one_optimizer_for_two_models_wrapped_by_two_calls_steps_both_or_none(fused: bool) -> None:
    a, b = net(), net()
    optimizer = torch.optim.AdamW([*a.parameters(), *b.parameters()], lr=0.01, fused=fused)
    with pytest.warns(wrapprec.WrapprecWarning, match="no wrapped model owns"):
        first = wrapprec.wrap(a, optimizer, "16-mixed", loss_scale=LossScale(64.0))
        second = wrapprec.wrap(b, optimizer, "16-mixed", loss_scale=LossScale(64.0))
    for bad_a, bad_b in ((True, False), (False, True), (False, False)):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in (*a.parameters(), *b.parameters())]
        backward(a, bad_a)
        backward(b, bad_b)
        torch.nn.utils.clip_grad_value_([*a.parameters(), *b.parameters()], 1.0)
        for param in (*a.parameters(), *b.parameters()):
            param.grad.nan_to_num_(0.0)
        optimizer.step()
        after = [*a.parameters(), *b.parameters()]
        moved = [not torch.equal(p, q) for p, q in zip(before, after, strict=True)]
        # A clipped, overflowed gradient steps nothing of its own model ...
        assert not (bad_a and any(moved[:4])) and not (bad_b and any(moved[4:]))
        assert bad_a or bad_b or all(moved)
    assert first.scale < 64.0 and second.scale < 64.0
    first.unwrap()
    second.unwrap()
    optimizer.zero_grad()
    backward(a)
    backward(b)
    optimizer.step()


# What it keeps alive


@pytest.mark.parametrize("fused", [False, True])
def test_two_thousand_steps_take_no_more_memory_than_two_hundred(fused: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    handle = wrapprec.wrap(model, optimizer, "16-module", loss_scale=LossScale(64.0), scheduler=scheduler)
    x = torch.ones(1, 2)

    def steps(number: int) -> int:
        for i in range(number):
            optimizer.zero_grad()
            (model(x).mean() * (math.inf if i % 50 == 7 else 1.0)).backward()
            optimizer.step()
            scheduler.step()
        gc.collect()
        return len(gc.get_objects())

    early = steps(200)
    late = steps(1800)
    # The bookkeeping of the latest 64 backwards, and whatever the interpreter caches.
    assert late - early < 50
    assert handle.skipped_steps == 40


@pytest.mark.parametrize("policy", ["16-mixed", "16-module", "bf16-module"])
def test_a_dropped_model_with_its_optimizer_and_handle_is_collected(policy: str) -> None:
    def use() -> list[weakref.ref[Any]]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters())
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        handle = wrapprec.wrap(model, optimizer, policy, scheduler=scheduler)
        for bad in (False, True, False):
            optimizer.zero_grad()
            backward(model, bad and policy.startswith("16"))
            optimizer.step()
            scheduler.step()
        model(torch.ones(2, 3))  # an audit may be armed
        weights = [weakref.ref(p) for p in model.parameters()]
        return [weakref.ref(model), weakref.ref(optimizer), weakref.ref(handle), weakref.ref(scheduler), *weights]

    left = use()
    gc.collect()
    assert [ref() for ref in left if ref() is not None] == []


def test_a_rebuilt_optimizer_does_not_keep_the_old_ones_state_alive() -> None:
    model = net()
    handle = wrapprec.wrap(model, policy="16-mixed", loss_scale=LossScale(64.0))
    old = []
    for _ in range(3):
        optimizer = torch.optim.Adam(model.parameters())
        handle.attach(optimizer)
        old.append(weakref.ref(optimizer))
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    assert [ref() is None for ref in old] == [True, True, False]
