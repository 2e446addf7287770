"""When an audit runs, what it leaves behind, and what it says."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec
from wrapprec import audit
from wrapprec.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

REAL = {name: getattr(torch.autograd, name) for name in ("backward", "grad", "_engine_run_backward")}


def nothing_is_replaced() -> bool:
    return all(getattr(torch.autograd, name) is real for name, real in REAL.items())


@pytest.fixture(autouse=True)
def no_other_model() -> None:
    """Models of other tests, waiting for their backward, are gone."""
    gc.collect()
    for key in list(audit._due):
        audit._dismiss(key)


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was audited so far."""
    seen: list[Any] = []
    walk = audit.walk
    monkeypatch.setattr(audit, "walk", lambda *args: (seen.append(args), walk(*args))[1])
    return seen


def wrapped() -> tuple[nn.Module, wrapprec.Handle]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return model, wrapprec.wrap(model, policy="16-mixed", loss_scale=8)


def step(model: nn.Module) -> None:
    model(torch.randn(2, 4)).sum().backward()
    assert nothing_is_replaced()


def test_the_first_three_backwards_are_audited_and_then_none(audits: list[Any]) -> None:
    model, _ = wrapped()
    for _ in range(6):
        step(model)
    assert len(audits) == 3


def test_a_change_of_mode_or_of_the_outputs_structure_is_audited(audits: list[Any]) -> None:
    class Varies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kind = nn.Linear(4, 4), tuple

        def forward(self, x: Tensor) -> Any:
            return self.kind([self.layer(x), 1])

    model = Varies()
    wrapprec.wrap(model, policy="16-mixed", loss_scale=8)

    def run() -> None:
        model(torch.randn(2, 4))[0].sum().backward()

    for _ in range(4):
        run()
    assert len(audits) == 3
    model.eval()
    run(), run()
    assert len(audits) == 4
    model.kind = list  # type: ignore[assignment]
    run(), run()
    assert len(audits) == 5
    model.layer = nn.Linear(4, 4)
    run()
    assert len(audits) == 6


def test_every_thousandth_forward_is_audited(audits: list[Any]) -> None:
    schedule = Schedule()
    due = []
    for _ in range(2000):
        due.append(schedule.is_due("same"))
        schedule.left -= due[-1]
    assert [i + 1 for i, is_due in enumerate(due) if is_due] == [1, 2, 3, 1000, 2000]


def test_loading_a_checkpoint_starts_anew(audits: list[Any]) -> None:
    model, handle = wrapped()
    for _ in range(4):
        step(model)
    handle.load_state_dict(handle.state_dict())
    for _ in range(4):
        step(model)
    assert len(audits) == 6


def test_backward_of_something_else_does_not_use_an_audit_up(audits: list[Any]) -> None:
    model, _ = wrapped()
    other = torch.ones(2, requires_grad=True)
    out = model(torch.randn(2, 4))
    for _ in range(5):
        (other * 2).sum().backward()
    assert not nothing_is_replaced()
    out.sum().backward()
    assert nothing_is_replaced() and len(audits) == 6
    collected: list[Tensor] = []
    model[0].register_forward_hook(lambda m, a, out: collected.append(out))  # type: ignore[index]
    for _ in range(3):
        model(torch.randn(2, 4))
        (other * 2).sum().backward()
    with pytest.raises(wrapprec.ScaleLeakError):
        collected[-1].float().sum().backward()
    collected.clear()
    step(model)


def test_unwrap_and_a_dropped_model_leave_nothing_in_place() -> None:
    model, handle = wrapped()
    model(torch.randn(2, 4))
    assert not nothing_is_replaced()
    handle.unwrap()
    assert nothing_is_replaced()
    model, handle = wrapped()
    model(torch.randn(2, 4))
    del model, handle
    gc.collect()
    assert nothing_is_replaced()


def test_error_in_an_audit_names_module_parameter_and_remedy_and_computes_no_gradient() -> None:
    model, handle = wrapped()
    collected: list[Tensor] = []
    model[0].register_forward_hook(lambda m, a, out: collected.append(out))  # type: ignore[index]
    model(torch.randn(2, 4))
    with pytest.raises(wrapprec.ScaleLeakError) as caught:
        collected[0].float().sum().backward()
    text = str(caught.value)
    assert "parameter 'weight' of module \"0\" (Linear)" in text and "wrapprec.leave" in text
    assert all(p.grad is None for p in model.parameters())
    handle.unwrap()
    assert nothing_is_replaced()


def test_nothing_is_audited_without_a_loss_scale_or_without_gradients(audits: list[Any]) -> None:
    model = nn.Linear(4, 4)
    wrapprec.wrap(model, policy="bf16-mixed")
    model(torch.randn(2, 4)).sum().backward()
    scaled, _ = wrapped()
    with torch.no_grad():
        scaled(torch.randn(2, 4))
    assert nothing_is_replaced() and not audits


def test_schedule_of_a_copy_starts_anew() -> None:
    schedule = Schedule()
    for _ in range(5):
        schedule.is_due(type("Local", (), {}))
    copied = pickle.loads(pickle.dumps(schedule))
    assert copied.left == 3 and copied.forwards == 0 and not copied.known
