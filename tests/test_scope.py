"""Who opens a scope, who closes it, and what it puts back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import wrapprec
from wrapprec import scope

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

CONFIGS: list[Any] = [("16-mixed", 8), ("16-module", 8), ("bf16-mixed", None), ("bf16-module", None), ("32-true", 8)]
each_config = pytest.mark.parametrize(("policy", "scale"), CONFIGS, ids=str)


class Looks(nn.Module):
    """Notes the scope that is open while it runs."""

    def __init__(self, *below: nn.Module) -> None:
        super().__init__()
        self.layer, self.below, self.scopes = nn.Linear(4, 4), nn.ModuleList(below), []

    def forward(self, x: Tensor) -> Tensor:
        self.scopes.append(scope.thread.scope)
        x = self.layer(x)
        for module in self.below:
            x = module(x)
        return x


@each_config
def test_whichever_module_is_entered_first_opens_and_the_same_one_closes(policy: str, scale: Any) -> None:
    inner = Looks()
    model = Looks(inner)
    wrapprec.wrap(model, policy=policy, loss_scale=scale)
    model(torch.ones(2, 4))
    assert model.scopes[0] is inner.scopes[0] is not None and scope.thread.scope is None
    inner(torch.ones(2, 4))
    assert inner.scopes[1] is not inner.scopes[0] and scope.thread.scope is None
    model.forward(torch.ones(2, 4))
    assert model.scopes[1] is inner.scopes[2] is not None and scope.thread.scope is None


@each_config
def test_two_wrapped_models_inside_one_another_open_a_scope_each(policy: str, scale: Any) -> None:
    other = Looks()

    class Calls(Looks):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(OTHER[0](x))
            return out

    OTHER[0] = other
    model = Calls()
    wrapprec.wrap([model, other], policy=policy, loss_scale=scale)
    model(torch.ones(2, 4))
    assert other.scopes[0].outer is model.scopes[0] and scope.thread.scope is None


OTHER: list[Any] = [None]


@each_config
def test_weights_are_lent_only_where_they_must_be(policy: str, scale: Any) -> None:
    model = Looks()
    wrapprec.wrap(model, policy=policy, loss_scale=scale)
    seen: list[Any] = []
    model.layer.register_forward_hook(lambda module, args, out: seen.append(module.weight))
    model(torch.ones(2, 4))
    with torch.no_grad():
        model(torch.ones(2, 4))
    casts = policy.endswith("module")
    assert (seen[0] is not model.layer.weight) == (casts or scale is not None)
    assert (seen[1] is not model.layer.weight) == casts
    # The same storage where only the border is needed.
    assert (seen[0].data_ptr() == model.layer.weight.data_ptr()) == (not casts)


@each_config
def test_a_weight_used_in_two_places_is_cast_once(policy: str, scale: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    seen: list[Any] = []
    for layer in model:
        layer.register_forward_hook(lambda module, args, out: seen.append(module.weight))
    wrapprec.wrap(model, policy=policy, loss_scale=scale)
    model(torch.ones(2, 4))
    assert seen[0] is seen[1]


@each_config
def test_data_of_a_parameter_that_was_changed_between_forwards_is_seen(policy: str, scale: Any) -> None:
    """An average that is swapped in, a clamp: no version counter tells."""
    model = nn.Linear(4, 4, bias=False)
    wrapprec.wrap(model, policy=policy, loss_scale=scale)
    x = torch.ones(1, 4)
    model(x)
    model.weight.data.fill_(1)
    assert model(x).tolist() == [[4.0] * 4]
    model.weight.data = torch.zeros(4, 4)
    assert model(x).tolist() == [[0.0] * 4]


def test_leave_outside_of_everything_gives_the_tensor_itself() -> None:
    plain, grown = torch.ones(2), torch.ones(2, requires_grad=True) * 2
    assert wrapprec.leave(plain) is plain and wrapprec.leave(grown) is grown


def test_no_lend_and_no_walk_when_nothing_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a bf16 policy by operation nothing is lent, and no attribute is looked at."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrapprec.wrap(model, policy="bf16-mixed")

    def forbidden(*args: Any) -> None:
        raise AssertionError("needless work")

    for name in ("lend", "mend_attributes", "mend_given", "mend_opaque"):
        monkeypatch.setattr(scope, name, forbidden)
    model(torch.ones(2, 4)).sum().backward()


@pytest.mark.parametrize(("policy", "scale"), [*CONFIGS[:2], *CONFIGS[2:4]], ids=str)
def test_weight_first_asked_for_inside_a_transform_or_no_grad_keeps_its_gradient(policy: str, scale: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.silent = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            slope = torch.func.vmap(torch.func.grad(lambda row: torch.tanh(self.inner(row)).sum()))(x.detach())
            with torch.no_grad():
                self.silent(x)
            with torch.inference_mode():
                self.inner.weight.sum()
            return self.inner(x) + self.silent(x) + slope.detach().to(x.dtype)

    torch.manual_seed(0)
    plain = Net()
    model = copy.deepcopy(plain)
    wrapprec.wrap(model, policy=policy, loss_scale=scale)
    x = torch.randn(3, 4)
    plain(x).pow(2).sum().backward()
    model(x).pow(2).sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        # A few roundings of 2**-9 (bf16) or 2**-12 (f16).
        assert (mine.grad - theirs.grad).norm() <= (0.04 if policy.startswith("bf16") else 0.005) * theirs.grad.norm()


def test_weight_that_is_not_used_is_not_cast() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    wrapprec.wrap(model, policy="bf16-module")
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        model(torch.ones(2, 4))
    casts = next(event.count for event in trace.key_averages() if event.key == "aten::_to_copy")
    assert casts == 4, "input, weight, bias and output"
