"""Hooks of every kind: as often, in the same order, with float32's values and dtypes, as on the unwrapped model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils.checkpoint import checkpoint

import wrapprec

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
SCALE = 1024.0
# A handful of roundings of 2**-9 (bf16) or 2**-12 (f16) in the norm of an activation or a gradient.
TOLERANCE = {"bf": 0.03, "16": 0.004}
each_policy = pytest.mark.parametrize("policy", POLICIES)

Event = tuple[str, list[Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)))) * gain


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.body = Net()
        self.reentrant = reentrant

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant) * gain


def pair(policy: str, make: Callable[[], nn.Module] = Net) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = make()
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy, loss_scale=SCALE if policy.startswith("16") else None)
    return mine, plain


def train(model: nn.Module) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    model(x, gain=0.5).square().mean().backward()


def tensors(*values: Any) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(values)
    return [value.detach().clone() for value in found if isinstance(value, Tensor)]


def assert_same(got: list[Event], want: list[Event], policy: str, dtypes: bool = True) -> None:
    assert [name for name, _ in got] == [name for name, _ in want] and want
    for (name, mine), (_, true) in zip(got, want, strict=True):
        assert len(mine) == len(true), name
        for one, other in zip(mine, true, strict=True):
            assert one.shape == other.shape and (one.dtype == other.dtype or not dtypes), name
            off = (one.float() - other.float()).norm()
            assert off <= TOLERANCE[policy[:2]] * other.float().norm(), f"{name}: {off}"


def root_hooks(model: nn.Module, note: Callable[..., None]) -> None:
    model.register_forward_pre_hook(lambda m, args: note("pre", args))
    model.register_forward_pre_hook(lambda m, args, kwargs: note(f"pre {kwargs}", args), with_kwargs=True)
    model.register_forward_hook(lambda m, args, out: note("forward", args, out))
    model.register_forward_hook(lambda m, a, kwargs, out: note(f"forward {kwargs}", out), with_kwargs=True)
    model.register_forward_hook(lambda m, args, out: note("always", out), always_call=True)
    model.register_forward_hook(lambda m, args, out: note("first of all", out), prepend=True)
    model.register_full_backward_pre_hook(lambda m, grads: note("backward pre", grads))
    model.register_full_backward_hook(lambda m, inputs, outputs: note("backward", inputs, outputs))


@each_policy
def test_hooks_on_the_model_itself_see_what_they_see_in_float32(policy: str) -> None:
    mine, plain = pair(policy)
    seen: dict[int, list[Event]] = {}
    for model in (mine, plain):
        events = seen[id(model)] = []
        root_hooks(model, lambda name, *values, events=events: events.append((name, tensors(*values))))
        train(model)
        train(model)
    assert_same(seen[id(mine)], seen[id(plain)], policy)


@each_policy
@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_inside_fire_as_often_and_in_the_same_order_also_in_a_recomputation(policy: str, reentrant: bool) -> None:
    mine, plain = pair(policy, lambda: Checkpointed(reentrant))
    seen: dict[int, list[Event]] = {}
    for model in (mine, plain):
        events = seen[id(model)] = []

        def put(name: str, module: nn.Module, events: list[Event] = events) -> None:
            def note(kind: str, *values: Any) -> None:
                events.append((f"{name} {kind}", tensors(*values)))

            module.register_forward_pre_hook(lambda m, args: note("pre", args))
            module.register_forward_hook(lambda m, args, out: note("forward", out))
            module.register_forward_hook(lambda m, args, out: note("always", out), always_call=True)

        for name, module in model.named_modules():
            put(name, module)
        train(model)
    assert sum(name == "body.norm forward" for name, _ in seen[id(plain)]) == 2, "forward and recomputation"
    assert_same(seen[id(mine)], seen[id(plain)], policy, dtypes=False)


@each_policy
def test_value_that_a_hook_returns_is_taken(policy: str) -> None:
    mine, plain = pair(policy)
    seen: dict[int, list[Event]] = {}
    for model in (mine, plain):
        model.first.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        model.last.register_forward_hook(lambda m, args, out: out * 3)
        model.register_forward_hook(lambda m, args, out: out + 1)
        model.register_full_backward_pre_hook(lambda m, grads: (grads[0] * 5,))
        train(model)
        seen[id(model)] = [(name, tensors(param.grad)) for name, param in model.named_parameters()]
    assert_same(seen[id(mine)], seen[id(plain)], policy)


@each_policy
def test_hooks_on_parameters_and_tensors_see_true_gradients_once(policy: str) -> None:
    mine, plain = pair(policy)
    seen: dict[int, list[Event]] = {}
    for model in (mine, plain):
        events = seen[id(model)] = []

        def note(name: str, grad: Tensor, events: list[Event] = events) -> None:
            events.append((name, tensors(grad)))

        for name, param in model.named_parameters():
            param.register_hook(lambda grad, name=name: note(f"hook {name}", grad))
            param.register_post_accumulate_grad_hook(lambda p, name=name: note(f"post {name}", p.grad))
        torch.autograd.graph.register_multi_grad_hook(
            tuple(model.parameters()), lambda grads, note=note: [note("multi", grad) for grad in grads]
        )
        x = torch.ones(2, 4, requires_grad=True)
        x.register_hook(lambda grad, note=note: note("input", grad))
        out = model(x)
        out.register_hook(lambda grad, note=note: note("output", grad))
        out.retain_grad()
        out.square().mean().backward()
        note("retained", out.grad)
    # In which order a layer's weight and bias get theirs is autograd's choice, and differs under torch.autocast too.
    assert_same(sorted(seen[id(mine)], key=_name), sorted(seen[id(plain)], key=_name), policy)


@each_policy
def test_hooks_on_parameters_that_a_loss_does_not_reach_are_not_called(policy: str) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.unused = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.other(x)

    torch.manual_seed(0)
    plain = Heads()
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy, loss_scale=SCALE if policy.startswith("16") else None)
    seen: dict[int, list[Event]] = {}
    for model in (mine, plain):
        events = seen[id(model)] = []

        def step(param: Tensor, name: str, events: list[Event] = events) -> None:
            events.append((f"step {name}", tensors(param.grad)))
            param.grad = None

        for name, param in model.named_parameters():
            param.register_hook(lambda grad: grad * 2)
            param.register_post_accumulate_grad_hook(lambda p, name=name, step=step: step(p, name))
        one, other = model(torch.ones(2, 4))
        one.square().mean().backward()
        events.append(("between", []))
        other.square().mean().backward()
        between = events.index(("between", []))
        events[:] = sorted(events[:between], key=_name) + sorted(events[between:], key=_name)
    assert [name for name, _ in seen[id(mine)]] == [name for name, _ in seen[id(plain)]]
    assert_same(seen[id(mine)], seen[id(plain)], policy)


def _name(event: Event) -> str:
    return event[0]


@each_policy
def test_hooks_on_all_modules_fire_once_for_each(policy: str) -> None:
    mine, plain = pair(policy)
    seen: dict[int, list[str]] = {}
    for model in (mine, plain):
        events = seen[id(model)] = []

        def note(kind: str, events: list[str] = events) -> Callable[..., None]:
            return lambda module, *values: events.append(f"{kind} {type(module).__name__}")

        hooks = [
            every_module.register_module_forward_pre_hook(note("pre")),
            every_module.register_module_forward_hook(note("forward")),
            every_module.register_module_forward_hook(note("always"), always_call=True),
            every_module.register_module_full_backward_pre_hook(note("backward pre")),
            every_module.register_module_full_backward_hook(note("backward")),
        ]
        try:
            train(model)
        finally:
            for hook in hooks:
                hook.remove()
    assert seen[id(mine)] == seen[id(plain)] and len(seen[id(plain)]) == 20


@each_policy
def test_hooks_of_state_dict_fire_once_and_see_the_parameters(policy: str) -> None:
    mine, plain = pair(policy)
    seen: dict[int, list[Event]] = {}
    for model in (mine, plain):
        events = seen[id(model)] = []

        def note(name: str, *values: Any, events: list[Event] = events) -> None:
            events.append((name, tensors(*values)))

        model.last.register_state_dict_pre_hook(lambda m, p, keep, note=note: note("pre", m.weight))
        model.last.register_state_dict_post_hook(
            lambda m, state, p, meta, note=note: note("post", list(state.values()))
        )
        model.register_load_state_dict_pre_hook(lambda m, state, *rest, note=note: note("load", list(state.values())))
        model.register_load_state_dict_post_hook(lambda m, keys, note=note: note("loaded", m.first.weight))
        model.load_state_dict(model.state_dict())
    assert_same(seen[id(mine)], seen[id(plain)], policy)
    assert [name for name, _ in seen[id(mine)]] == ["pre", "post", "load", "loaded"]


@pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-module"])
def test_backward_hooks_inside_see_true_gradients_without_a_loss_scale(policy: str) -> None:
    mine, plain = pair(policy)
    seen: dict[int, list[Event]] = {}
    for model in (mine, plain):
        events = seen[id(model)] = []
        for name, module in model.named_children():
            module.register_full_backward_hook(
                lambda m, inputs, outputs, name=name, events=events: events.append((name, tensors(inputs, outputs)))
            )
        train(model)
    assert_same(seen[id(mine)], seen[id(plain)], policy, dtypes=False)


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_backward_hooks_inside_see_the_scale_times_true_and_a_warning_says_so(policy: str) -> None:
    mine, plain = pair(policy)
    seen: dict[int, list[Event]] = {}
    for model, factor in ((mine, 1 / SCALE), (plain, 1.0)):
        events = seen[id(model)] = []
        model.last.register_full_backward_hook(
            lambda m, inputs, outputs, events=events, factor=factor: events.append(
                ("last", [grad.float() * factor for grad in tensors(inputs, outputs)])
            )
        )
    with pytest.warns(wrapprec.WrapprecWarning, match=r'"last" \(Linear\)'):
        train(mine)
    train(plain)
    assert_same(seen[id(mine)], seen[id(plain)], policy)


@each_policy
def test_always_called_hook_fires_once_when_forward_raises_and_the_error_comes_out(policy: str) -> None:
    class Failing(Net):
        def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
            self.first(x)
            raise ValueError("from inside")

    mine, plain = pair(policy, Failing)
    for model in (mine, plain):
        calls: list[Any] = []
        model.register_forward_hook(lambda m, args, out, calls=calls: calls.append(out), always_call=True)
        model.first.register_forward_hook(lambda m, args, out, calls=calls: calls.append("first"), always_call=True)
        with pytest.raises(ValueError, match="from inside"):
            model(torch.ones(1, 4))
        assert calls == ["first", None]
    assert wrapprec.handle_of(mine) is not None and mine.first.weight.dtype == torch.float32
