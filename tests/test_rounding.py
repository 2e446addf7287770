"""Low precision weights keep small updates, with any optimizer; the reference is the same optimizer in float32."""

from __future__ import annotations

import copy
import functools
import gc
import io
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import wrapprec
from wrapprec import StepError, WrapprecWarning
from wrapprec.lowbit import rounding
from wrapprec.lowbit.codes import quantise
from wrapprec.lowbit.words import combine, split

BF16 = torch.bfloat16
Make = Callable[[Any], Optimizer]


class Lion(Optimizer):
    """A user's optimizer: signs of a moving average, state made at the first step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["mean"] = torch.zeros_like(p)
                    p.data.add_(state["mean"].lerp(p.grad, 0.1).sign(), alpha=-group["lr"])
                    state["mean"].lerp_(p.grad, 0.01)


class Remembers(Optimizer):
    """A user's optimizer that keeps its momentum in a dict of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.momentum: dict[Any, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.momentum[p] = 0.9 * self.momentum.get(p, 0) + p.grad
                p.sub_(self.momentum[p], alpha=group["lr"])


O = torch.optim  # noqa: E741  # a table of optimizers reads better
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: O.SGD(p, lr=1e-5),
    "SGD foreach": lambda p: O.SGD(p, lr=1e-6, momentum=0.9, foreach=True),
    "SGD fused": lambda p: O.SGD(p, lr=1e-6, momentum=0.9, fused=True),
    "Adam": lambda p: O.Adam(p, lr=1e-5, foreach=False),
    "Adam foreach": lambda p: O.Adam(p, lr=1e-5, foreach=True),
    "Adam fused": lambda p: O.Adam(p, lr=1e-5, fused=True),
    "AdamW fused": lambda p: O.AdamW(p, lr=1e-5, weight_decay=0.1, fused=True),
    "AdamW amsgrad": lambda p: O.AdamW(p, lr=1e-5, amsgrad=True),
    "Adagrad": lambda p: O.Adagrad(p, lr=1e-4),
    "RMSprop": lambda p: O.RMSprop(p, lr=1e-5, momentum=0.1),
    "Adadelta": lambda p: O.Adadelta(p, lr=1e-2),
    "Adamax": lambda p: O.Adamax(p, lr=1e-5),
    "NAdam": lambda p: O.NAdam(p, lr=1e-5),
    "RAdam": lambda p: O.RAdam(p, lr=1e-5),
    "ASGD": lambda p: O.ASGD(p, lr=1e-5),
    "Rprop": lambda p: O.Rprop(p, lr=1e-5, step_sizes=(1e-6, 1e-5)),
    "Lion": lambda p: Lion(p, lr=1e-5),
    "Remembers": lambda p: Remembers(p, lr=1e-6),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
# What the issue of low precision weights names; the others are compared bit for bit below.
each_common = pytest.mark.parametrize(
    "name", ["SGD", "SGD fused", "Adam", "Adam foreach", "Adam fused", "AdamW fused", "Adagrad", "RMSprop", "Lion"]
)
each_mode = pytest.mark.parametrize("mode", ["kahan", "stochastic", "nearest"])


class Weights(nn.Module):
    """A module of given weights."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList(values)

    def forward(self, x: Tensor) -> Tensor:
        return sum((x * weight).sum() for weight in self.weights)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s)Expected a rounding")
        warnings.filterwarnings("ignore", "float16 on a CPU without float16 instructions")
        yield


def constant_update(name: str, policy: str, size: int) -> tuple[Tensor, Tensor]:
    """How far 1,000 steps of a gradient of one move float32 weights, and those under a policy."""
    start = torch.linspace(0.6, 1.9, size)
    moved = []
    for wrapped in (False, True):
        model = Weights(start.clone())
        optimizer = OPTIMIZERS[name](model.parameters())
        handle = wrapprec.wrap(model, optimizer, policy) if wrapped else None
        weight = model.weights[0]
        weight.grad = torch.ones_like(weight)
        for _ in range(1000):
            optimizer.step()
        # Without remainders a run starts from rounded weights.
        before = start.to(BF16).float() if wrapped and "rounding" in policy else start
        if handle is not None:
            handle.unwrap()
        moved.append(weight.detach() - before)
    return moved[0], moved[1]


@each_common
def test_constant_tiny_update_moves_each_weight_like_float32_under_kahan(name: str) -> None:
    true, moved = constant_update(name, "bf16-true", 64)
    assert true.abs().min() > 0
    assert ((moved - true).abs() <= 0.05 * true.abs()).all()


@each_common
def test_constant_tiny_update_moves_the_mean_like_float32_under_stochastic(name: str) -> None:
    true, moved = constant_update(name, "bf16-true,rounding=stochastic", 10_000)
    assert abs(moved.mean() - true.mean()) <= 0.05 * true.mean().abs()


def test_constant_tiny_update_is_lost_under_nearest() -> None:
    true, moved = constant_update("SGD", "bf16-true,rounding=nearest", 64)
    assert true.abs().min() > 0.009
    assert not moved.any()


def test_float16_weights_keep_small_updates_too() -> None:
    true, moved = constant_update("Adam fused", "16-true", 64)
    assert ((moved - true).abs() <= 0.05 * true.abs()).all()


@each_optimizer
@pytest.mark.parametrize("policy", ["bf16-true", "16-true"])
def test_kahan_steps_are_those_of_float32_bit_for_bit(name: str, policy: str) -> None:
    """Given the same gradients, which are low precision, the weights are those of a float32 run, rounded."""
    torch.manual_seed(0)
    # Of float16's normal range, where nothing at all is lost.
    start = [torch.randn(5, 3) + 3, torch.rand(7) + 1]
    plain, mine = Weights(*map(torch.clone, start)), Weights(*map(torch.clone, start))
    reference, optimizer = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](mine.parameters())
    handle = wrapprec.wrap(mine, optimizer, policy)
    for _ in range(20):
        for true, weight in zip(plain.weights, mine.weights, strict=True):
            weight.grad = torch.randn(weight.shape).to(weight.dtype)
            true.grad = weight.grad.float()
        reference.step()
        optimizer.step()
        for true, weight in zip(plain.weights, mine.weights, strict=True):
            assert torch.equal(weight, split(true.detach(), weight.dtype)[0])
    state = {key: value for key, value in optimizer.state.get(mine.weights[0], {}).items() if torch.is_tensor(value)}
    for key, value in state.items():
        assert value.dtype is reference.state[plain.weights[0]][key].dtype
        assert torch.equal(value, reference.state[plain.weights[0]][key])
    handle.unwrap()
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, mine.weights, strict=True))
    if isinstance(optimizer, Remembers):
        return  # what it keeps elsewhere than in `optimizer.state` is known by the stand-ins
    for true, weight in zip(plain.weights, mine.weights, strict=True):
        true.grad = torch.ones_like(true)
        weight.grad = torch.ones_like(weight)
    reference.step()
    optimizer.step()  # on its own again, with the state that it has
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, mine.weights, strict=True))


@pytest.mark.parametrize("name", ["Adam", "AdamW8bit", "SGD8bit", "Lion", "AdEMAMix8bit", "RMSprop8bit"])
def test_optimizers_of_bitsandbytes_step_as_in_float32(name: str) -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    torch.manual_seed(0)
    start = torch.rand(64, 128) + 1
    options = {"momentum": 0.9} if name.startswith("SGD") else {}
    plain, mine = Weights(start.clone()), Weights(start.clone())
    reference, optimizer = (getattr(optim, name)(m.parameters(), lr=1e-3, **options) for m in (plain, mine))
    handle = wrapprec.wrap(mine, optimizer, "bf16-true")
    for step in range(4):
        mine.weights[0].grad = torch.randn(64, 128).to(BF16)
        plain.weights[0].grad = mine.weights[0].grad.float()
        reference.step()
        optimizer.step()
        if step == 1:  # what bitsandbytes loads it casts to the parameter's dtype
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    handle.unwrap()
    assert torch.equal(mine.weights[0], plain.weights[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_state_in_few_bits_is_as_of_float32_weights(bits: int) -> None:
    """The same weights, and the same parts of the state quantised: not those of an embedding."""
    pytest.importorskip("bitsandbytes" if bits == 8 else "torchao")
    models, optimizers, handles = [], [], []
    for policy in ("32-true", "bf16-true"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 128))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        models.append(model)
        optimizers.append(optimizer)
        handles.append(wrapprec.wrap(model, optimizer, policy, optimizer_bits=bits))
    for _ in range(5):
        for true, param in zip(models[0].parameters(), models[1].parameters(), strict=True):
            param.grad = torch.randn(param.shape).to(BF16)
            true.grad = param.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    kinds = [[type(state["exp_avg"]) for state in optimizer.state.values()] for optimizer in optimizers]
    assert kinds[0] == kinds[1] == [Tensor, dict, Tensor]
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for handle in handles:
        handle.unwrap()
    for true, param in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(true, param)
        assert optimizers[1].state[param]["exp_avg"].dtype is torch.float32
    optimizers[1].zero_grad()
    models[1](torch.arange(4)).sum().backward()
    optimizers[1].step()


@pytest.mark.parametrize("saved", ["32-true", "bf16-true", "bf16-true,rounding=none"])
@pytest.mark.parametrize("saved_bits", [None, 8])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_any_checkpoint_goes_on_as_quantised_state_of_float32_weights(kind: str, saved: str, saved_bits: Any) -> None:
    """It is quantised from the numbers that were saved, and means float32 numbers to the optimizer."""
    pytest.importorskip("bitsandbytes")
    options = {"momentum": 0.9} if kind == "SGD" else {}
    name = "momentum_buffer" if kind == "SGD" else "exp_avg"

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(64, 128)
        return model, getattr(torch.optim, kind)(model.parameters(), lr=1e-3, **options)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1)).to(param.dtype)
        optimizer.step()

    first, before = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rounding that loses small updates
        wrapprec.wrap(first, before, saved, optimizer_bits=saved_bits)
    step(first, before)
    checkpoint = copy.deepcopy(before.state_dict())
    model, optimizer = build()
    wrapprec.wrap(model, optimizer, "bf16-true", optimizer_bits=8)
    optimizer.load_state_dict(checkpoint)
    held, given = optimizer.state[model.weight][name], before.state[first.weight][name]
    expected = given if saved_bits else quantise(given.float(), 8, True)
    assert held["dtype"] is torch.float32
    assert torch.equal(held["codes"], expected["codes"])
    assert torch.equal(held["absmax"], expected["absmax"])
    step(model, optimizer)
    assert optimizer.state[model.weight][name]["dtype"] is torch.float32


def test_codes_that_a_low_precision_optimizer_has_loaded_by_itself_are_refused() -> None:
    """Float16 would make zeros of the scales of second moments."""
    pytest.importorskip("bitsandbytes")
    model = nn.Linear(64, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = wrapprec.wrap(model, optimizer, "16-true", optimizer_bits=8)
    model.weight.grad = torch.full_like(model.weight, 1e-4)
    optimizer.step()
    rebuilt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rebuilt.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    handle.attach(rebuilt)
    with pytest.raises(StepError) as raised:
        rebuilt.step()
    assert str(raised.value) == (
        "Expected state in 8 bits, loaded by an optimizer that was converted before.\n"
        "Received: scales that torch has rounded to float16, the dtype of the parameter\n"
        "Remedy: give the optimizer to wrap, or handle.attach, before its load_state_dict"
    )


def test_lbfgs_evaluates_rounded_weights_and_moves_float32_ones() -> None:
    target = torch.linspace(-1, 1, 6) * 0.9
    true = nn.Parameter(torch.linspace(1, 2, 6))
    reference = torch.optim.LBFGS([true], lr=0.5, max_iter=5)

    def by_hand() -> Tensor:
        low = split(true.detach(), BF16)[0].requires_grad_()
        loss = ((low - target.to(BF16)) ** 2).float().sum()
        loss.backward()
        true.grad = low.grad.float()
        return loss.detach()

    model = Weights(torch.linspace(1, 2, 6))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    handle = wrapprec.wrap(model, optimizer, "bf16-true")
    (weight,) = model.weights

    def closure() -> Tensor:
        optimizer.zero_grad()
        assert weight.grad is None, "zero_grad, in the closure, is about the model's own parameters"
        loss = ((weight - target.to(BF16)) ** 2).float().sum()
        loss.backward()
        return loss.detach()

    for _ in range(3):
        assert torch.equal(reference.step(by_hand), optimizer.step(closure))
    handle.unwrap()
    assert torch.equal(weight, true)


def test_parameters_stay_in_their_groups_and_stand_ins_hold_nothing() -> None:
    model, optimizer, _ = trained("bf16-true")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert set(optimizer.state) == set(params)
    assert [p.dtype for p in params] == [BF16, BF16, torch.float32, torch.float32, BF16, BF16]
    (rounder,) = handle_of(model)._rounders
    assert all(entry[3].numel() == 0 and entry[3].grad is None for entry in rounder._known.values())


def handle_of(model: nn.Module) -> wrapprec.Handle:
    handle = wrapprec.handle_of(model)
    assert handle is not None
    return handle


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


def trained(policy: str, steps: int = 3, **options: Any) -> tuple[nn.Module, Optimizer, wrapprec.Handle]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    handle = wrapprec.wrap(model, optimizer, policy)
    train(model, optimizer, range(steps))
    return model, optimizer, handle


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@each_mode
@pytest.mark.parametrize("fused", [False, True])
def test_resumed_run_ends_with_the_same_bits(mode: str, fused: bool) -> None:
    policy = f"bf16-true,rounding={mode}"
    whole, _, _ = trained(policy, 12, fused=fused)
    model, optimizer, handle = trained(policy, 5, fused=fused)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), handle.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    torch.manual_seed(99)  # another seed: what was saved must decide
    again = net()
    torch.manual_seed(98)
    resumed = torch.optim.AdamW(again.parameters(), lr=1e-3, fused=fused)
    other = wrapprec.wrap(again, resumed, policy)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    other.load_state_dict(states[2])
    moments = [value for state in resumed.state.values() for key, value in state.items() if key != "step"]
    assert all(moment.dtype is torch.float32 for moment in moments), "loading must not narrow them"
    train(again, resumed, range(5, 12))
    assert same(whole, again)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="before torch 2.10")
@pytest.mark.parametrize("asks", [False, True])
def test_copies_accumulate_gradients_in_float32_too(asks: bool) -> None:
    """Torch does not copy `grad_dtype` with a parameter."""
    model = nn.Linear(8, 4)
    wrapprec.wrap(model, policy="bf16-true,grads=float32")
    other = copy.deepcopy(model)
    if asks:  # before its first forward
        assert wrapprec.handle_of(other) is not None
    for seed in range(3):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
        for one in (model, other):
            one(x).float().sum().backward()
    assert model.weight.grad.dtype is other.weight.grad.dtype is torch.float32
    assert torch.equal(model.weight.grad, other.weight.grad)


@pytest.mark.parametrize("how", ["added", "replaced"])
def test_run_is_resumed_that_had_a_layer_more_or_another_one(how: str) -> None:
    """The new layer has seen no forward yet when the state is loaded."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer, wrapprec.Handle]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle = wrapprec.wrap(model, optimizer, "bf16-true")
        if how == "added":
            model.append(nn.Linear(16, 4))
            optimizer.add_param_group({"params": list(model[2].parameters())})
        else:
            model[1] = nn.Linear(16, 4)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            handle.attach(optimizer)
        return model, optimizer, handle

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
            model(x).float().square().sum().backward()
            optimizer.step()

    whole, optimizer, handle = build()
    go_on(whole, optimizer, range(3))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), handle.state_dict()))
    go_on(whole, optimizer, range(3, 6))
    resumed, optimizer, other = build()
    for one, state in zip((resumed, optimizer, other), saved, strict=True):
        one.load_state_dict(state)
    go_on(resumed, optimizer, range(3, 6))
    handle.unwrap(), other.unwrap()
    for param, reference in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert param.dtype is torch.float32 and torch.equal(param, reference)


def test_state_of_other_weights_is_refused_and_changes_nothing() -> None:
    _, _, handle = trained("bf16-true")
    state = handle.state_dict()
    state["rounding"][0]["rests"]["0.weight"] = torch.zeros(3, dtype=torch.int16)
    before = dict(handle.state_dict()["rounding"][0]["rests"])
    with pytest.raises(wrapprec.PolicyError) as error:
        handle.load_state_dict(state)
    assert str(error.value) == (
        "Expected the rounding state of this model.\n"
        "Received: a remainder of shape (3,), where the model has (8, 4)\n"
        "Where: '0.weight'\n"
        "Remedy: load the state that was saved with this model"
    )
    after = handle.state_dict()["rounding"][0]["rests"]
    assert all(after[name] is rest for name, rest in before.items())


def test_stochastic_rounding_follows_the_seed_and_leaves_the_users_random_numbers() -> None:
    ends, drawn = [], []
    for seed in (1, 1, 2):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(seed)
        wrapprec.wrap(model, optimizer, "bf16-true,rounding=stochastic")
        train(model, optimizer, range(5))
        ends.append(model)
        drawn.append(torch.rand(3))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])
    torch.manual_seed(1)
    assert torch.equal(drawn[0], torch.rand(3))


def test_deep_copy_takes_remainders_along_and_unwraps_to_its_own_dtypes() -> None:
    whole, _, handle = trained("bf16-true", 8)
    model, optimizer, _ = trained("bf16-true", 4)
    twin = copy.deepcopy(model)
    own = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    own.load_state_dict(optimizer.state_dict())
    for group, param in zip(own.state.values(), optimizer.state.values(), strict=True):
        group.update(copy.deepcopy(param))  # not attached yet: torch has narrowed what it loaded
    handle_of(twin).attach(own)
    train(twin, own, range(4, 8))
    assert same(whole, twin)
    wrapprec.unwrap(twin)
    handle.unwrap()
    assert same(whole, twin)
    assert all(p.dtype is torch.float32 for p in twin.parameters())
    assert next(model.parameters()).dtype is BF16


def counted(function: Any, calls: list[int]) -> Any:
    def count(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return count


def test_parts_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("kahan", "stochastic"):
        monkeypatch.setattr(rounding, "PART", 2**20)
        whole, _, _ = trained(f"bf16-true,rounding={mode}", 5)
        monkeypatch.setattr(rounding, "PART", 9)
        calls: list[int] = []
        monkeypatch.setattr(torch.optim.AdamW, "step", counted(torch.optim.AdamW.step, calls))
        parts, _, _ = trained(f"bf16-true,rounding={mode}", 5)
        monkeypatch.undo()
        assert same(whole, parts)
        assert len(calls) == 5 * 3, "32 elements; then 8, the norm and 16; then 2"


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_float32_copies_are_of_one_part_at_a_time(
    bits: int | None, scheduled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(rounding, "PART", 64 * 64)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    wrapprec.wrap(model, optimizer, "bf16-true", optimizer_bits=bits)
    model(torch.ones(1, 64)).sum().backward()
    elements: list[int] = []
    own = torch.optim.AdamW._init_group

    def spy(self: Any, group: dict[str, Any], *args: Any) -> Any:
        elements.append(sum(p.numel() for p in group["params"]))
        return own(self, group, *args)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", spy)
    optimizer.step()
    assert elements == [64 * 64] * 4


@pytest.mark.parametrize("scheduled", [False, True])
def test_step_that_somebody_replaced_is_called_once_in_float32(
    scheduled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "PART", 1)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[int] = []
    inner = optimizer.step

    @functools.wraps(getattr(inner, "__func__", inner))
    def step(*args: Any) -> Any:
        calls.append(len(optimizer.param_groups[0]["params"]))
        return inner(*args)

    optimizer.step = step  # type: ignore[method-assign]
    wrapprec.wrap(model, optimizer, "bf16-true")
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert calls == [len([*model.parameters()])]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("policy", ["bf16-true", "16-true,output=float32,loss_scale=dynamic"])
@pytest.mark.parametrize("bits", [None, 8])
def test_an_optimizer_that_is_dropped_is_freed(policy: str, bits: int | None, scheduled: bool) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")  # where it is imported, loading looks for an Accelerator among the callers

    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    handle = wrapprec.wrap(model, optimizer, policy, optimizer_bits=bits)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    handle.unwrap()


def test_step_hooks_run_once_a_step() -> None:
    model, optimizer, _ = trained("bf16-true")
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    train(model, optimizer, range(2))
    assert seen == ["before", "after"] * 2


def test_groups_added_later_are_rounded_too() -> None:
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-5)
    handle = wrapprec.wrap(model, optimizer, "bf16-true")
    optimizer.add_param_group({"params": model[3].parameters()})
    start = combine(model[3].weight.detach(), handle.state_dict()["rounding"][0]["rests"]["3.weight"])
    model[3].weight.grad = torch.ones_like(model[3].weight)
    for _ in range(10):
        optimizer.step()
    handle.unwrap()
    reference = start.clone()
    for _ in range(10):
        reference -= 1e-5
    assert torch.equal(model[3].weight, reference)


@pytest.mark.parametrize("when", ["before", "after"])
def test_schedulers_advance_without_a_warning(when: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    make = torch.optim.lr_scheduler.StepLR
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make(optimizer, 1, 0.5) if when == "before" else None
        handle = wrapprec.wrap(model, optimizer, "bf16-true")
        scheduler = scheduler or make(optimizer, 1, 0.5)
        train(model, optimizer, range(2))
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 5e-4
        handle.unwrap()
        train(model, optimizer, range(2))
    assert all(state["exp_avg"].dtype is torch.float32 for state in optimizer.state.values())


@pytest.mark.parametrize("options", [{}, {"fused": True}])
@each_mode
def test_skipped_step_changes_nothing(options: dict[str, Any], mode: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    policy = f"16-true,output=float32,loss_scale=dynamic,init_scale=1024,rounding={mode}"
    handle = wrapprec.wrap(model, optimizer, policy)
    train(model, optimizer, range(3))
    assert handle.skipped_steps == 0
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), handle.state_dict()["rounding"][0]["rests"]])
    optimizer.zero_grad()
    (model(torch.randn(6, 4)).sum() * math.inf).backward()
    optimizer.step()
    assert handle.step_was_skipped
    after = [model.state_dict(), optimizer.state_dict(), handle.state_dict()["rounding"][0]["rests"]]
    assert repr(after) == repr(before)
    train(model, optimizer, range(2))
    assert not same_values(model.state_dict(), before[0])


def same_values(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_closure_that_overflows_leaves_weights_and_remainders() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    handle = wrapprec.wrap(model, optimizer, "16-true,output=float32", loss_scale=1024.0)
    x, calls = torch.randn(6, 4), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(1)
        loss = model(x).square().mean()
        (loss * (math.inf if len(calls) > 2 else 1.0)).backward()
        return loss

    rests = copy.deepcopy(handle.state_dict()["rounding"][0]["rests"])
    before = copy.deepcopy(model.state_dict())
    optimizer.step(closure)
    assert handle.step_was_skipped
    assert len(calls) > 2, "the weights were changed in between"
    assert same_values(model.state_dict(), before)
    assert same_values(handle.state_dict()["rounding"][0]["rests"], rests)


class Sharp(Optimizer):
    """Sharpness-aware minimisation: another optimizer does the step, from where it was before the perturbation."""

    def __init__(self, params: Any, base: type[Optimizer], **kwargs: Any) -> None:
        super().__init__(params, {})
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base.step()


def test_sharpness_aware_steps_keep_small_updates() -> None:
    model = Weights(torch.linspace(1, 2, 8))
    optimizer = Sharp(model.parameters(), torch.optim.SGD, lr=1e-5)
    handle = wrapprec.wrap(model, optimizer, "bf16-true")
    true = torch.linspace(1, 2, 8)
    for _ in range(20):
        model.weights[0].grad = torch.ones(8, dtype=BF16)
        optimizer.climb()
        optimizer.step()
        true -= 1e-5
    handle.unwrap()
    assert torch.equal(model.weights[0], true)


def test_optimizer_that_steps_a_list_of_its_own_is_refused() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            self.mine = list(params)
            super().__init__(self.mine, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.mine:
                p.sub_(p.grad)

    model = net()
    optimizer = Own(model.parameters())
    wrapprec.wrap(model, optimizer, "bf16-true")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StepError) as error:
        train(model, optimizer, range(1))
    assert str(error.value) == (
        "Expected an optimizer that steps the parameters in its param_groups.\n"
        "Received: Own, which changed a parameter that it found elsewhere\n"
        "Where: '0.weight'\n"
        "Remedy: let it read param_groups at each step, or use rounding=none"
    )
    assert torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("mode", ["nearest", "none"])
def test_rounding_that_loses_small_updates_warns_once(mode: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(f"bf16-true,rounding={mode}")
    texts = [str(one.message) for one in caught if issubclass(one.category, WrapprecWarning)]
    assert texts == [
        "Expected a rounding that keeps small updates of low precision weights.\n"
        f"Received: rounding={mode}: updates of bfloat16 weights that are smaller than 2**-9 of the weight are lost\n"
        'Remedy: use rounding="kahan" or "stochastic"'
    ]


def test_rounding_none_leaves_the_step_to_the_optimizer() -> None:
    model, optimizer, _ = trained("bf16-true,rounding=none")
    assert "step" not in vars(optimizer)
    assert optimizer.state[model[0].weight]["exp_avg"].dtype is BF16


def test_weights_that_only_a_rule_stores_low_keep_small_updates() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    handle = wrapprec.wrap(model, optimizer, "bf16-mixed", rules=[("3", "bf16-true")])
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 4 + [BF16] * 2
    assert list(handle.state_dict()["rounding"][0]["rests"]) == ["3.weight", "3.bias"]
    train(model, optimizer, range(2))


@pytest.mark.parametrize("policy", ["bf16-true", "16-true", "64-true", "bf16-true,rounding=none"])
def test_optimizer_is_as_before_after_unwrap(policy: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, range(2))
    own, hooks = dict(vars(optimizer)), len(optimizer._optimizer_load_state_dict_post_hooks)
    types = {key: value.dtype for key, value in optimizer.state[model[0].weight].items()}
    handle = wrapprec.wrap(model, optimizer, policy)
    train(model, optimizer, range(2))
    handle.unwrap()
    assert vars(optimizer).keys() == own.keys()
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == hooks
    assert {key: value.dtype for key, value in optimizer.state[model[0].weight].items()} == types
    train(model, optimizer, range(2))


def test_moments_that_were_low_before_wrap_become_float32_and_low_again() -> None:
    model = net().to(BF16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    handle = wrapprec.wrap(model, optimizer, "bf16-true")
    train(model, optimizer, range(2))
    assert all(state["exp_avg"].dtype is torch.float32 for state in optimizer.state.values())
    handle.unwrap()
    assert all(p.dtype is BF16 for p in model.parameters())
    train(model.to(BF16), optimizer, range(0))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()


def test_compiled_model_trains_to_the_same_bits() -> None:
    whole, _, _ = trained("bf16-true", 4)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapprec.wrap(model, optimizer, "bf16-true")
    train(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer, range(4))
    assert same(whole, model)
