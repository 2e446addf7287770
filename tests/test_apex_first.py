"""Apex's first API, `amp.init`: its scripts train as in float32, and their models are found without being named."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wrapprec
from wrapprec.migrate.apex import amp
from wrapprec.migrate.apex import first as module


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    for handle in module._active:
        handle._deactivate()
    module._active.clear()


Loss = Callable[[torch.Tensor], Any]


def _train(start: Callable[[Any], tuple[Any, Loss]]) -> tuple[list[float], nn.Module]:
    """A loop in Apex's words: `start` gets an optimizer, and gives it and what makes a loss one to differentiate."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(32, 8), torch.randint(0, 4, (32,))
    optimizer, scale = start(torch.optim.Adam(net.parameters(), lr=0.02))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    curve = []
    for _ in range(8):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        with scale(loss) as scaled:
            scaled.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        curve.append(loss.item())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0002)
    return curve, net


def _by_handle(optimizer: Any) -> tuple[Any, Loss]:
    handle = amp.init(loss_scale=128.0)
    return optimizer, lambda loss: handle.scale_loss(loss, optimizer)


def _by_optimizer(optimizer: Any) -> tuple[Any, Loss]:
    wrapped = amp.init(enabled=True, verbose=True).wrap_optimizer(optimizer, num_loss=1)
    return wrapped, wrapped.scale_loss


def _off(optimizer: Any) -> tuple[Any, Loss]:
    wrapped = amp.init(enabled=False).wrap_optimizer(optimizer)
    return wrapped, wrapped.scale_loss


def test_a_handle_that_is_not_enabled_changes_nothing() -> None:
    curve, net = _train(_off)
    assert wrapprec.handle_of(net) is None and not amp.init(enabled=False).is_active()
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("start", [_by_handle, _by_optimizer])
def test_loop_follows_float32_and_its_model_is_wrapped(start: Any) -> None:
    want, _ = _train(_off)
    got, net = _train(start)
    # float16 keeps 11 bits in two products and a loss; Adam's steps are of the gradients' signs at first.
    assert got == pytest.approx(want, rel=0.002) and got != want
    handle = wrapprec.handle_of(net)
    assert handle is not None and str(handle.policy).startswith("params=float32,compute=float16")
    assert handle.scale == (128.0 if start is _by_handle else 2.0**16)


def test_each_later_model_is_found_and_an_overflow_skips_its_step() -> None:
    handle = amp.init()
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    for net in (first, second):
        optimizer = handle.wrap_optimizer(torch.optim.SGD(net.parameters(), lr=0.1))
        before = net.weight.detach().clone()
        with optimizer.scale_loss(net(torch.full((1, 2), 1e6)).sum()) as loss:  # inf in float16
            loss.backward()
        optimizer.step()
        found = wrapprec.handle_of(net)
        assert found is not None and found.step_was_skipped and torch.equal(net.weight, before)


def test_a_wrapped_optimizer_is_the_optimizer_in_all_else() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    wrapped = amp.init(enabled=False).wrap_optimizer(optimizer)
    assert isinstance(wrapped, torch.optim.SGD) and wrapped.param_groups is optimizer.param_groups
    wrapped.note = 3
    assert optimizer.note == 3  # type: ignore[attr-defined]
    file = io.BytesIO()
    torch.save(wrapped.state_dict(), file)


def test_second_init_is_refused_and_deactivating_leaves_torch_as_it_was() -> None:
    init, call = torch.optim.Optimizer.__init__, nn.Module.__call__
    handle = amp.init()
    with pytest.raises(wrapprec.WrapprecError, match=r"Received: another one\nRemedy: call amp\.init once, and keep"):
        amp.init()
    handle._deactivate()
    assert torch.optim.Optimizer.__init__ is init and nn.Module.__call__ is call
    amp.init()._deactivate()
