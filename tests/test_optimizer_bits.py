"""An optimizer of torch with state in few bits steps as by hand in float64, from the state that was kept."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fewbits import around, few_bits  # noqa: F401  one is a fixture of every test
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wrapprec
from wrapprec.lowbit.codes import dequantise, is_low, quantise

State = dict[str, Any]
both = pytest.mark.parametrize("bits", [8, 4])


# One step of each optimizer by hand, from the formulas of torch's documentation: (weight, gradient, state, settings)
# to (weight, state), in float64.


def adam(w: Tensor, g: Tensor, state: State, s: Any, decoupled: bool = False) -> tuple[Tensor, State]:
    (b1, b2), lr, t = s["betas"], float(s["lr"]), int(state["step"]) + 1
    g = -g if s["maximize"] else g
    if decoupled:
        w = w * (1 - lr * s["weight_decay"])
    else:
        g = g + s["weight_decay"] * w
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    out = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    if s["amsgrad"]:
        v = out["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
    return w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + s["eps"]), out


def adamw(w: Tensor, g: Tensor, state: State, s: Any) -> tuple[Tensor, State]:
    return adam(w, g, state, s, decoupled=True)


def nadam(w: Tensor, g: Tensor, state: State, s: Any) -> tuple[Tensor, State]:
    (b1, b2), lr, t = s["betas"], float(s["lr"]), int(state["step"]) + 1
    mu, following = (b1 * (1 - 0.5 * 0.96 ** (n * s["momentum_decay"])) for n in (t, t + 1))
    product = float(state["mu_product"]) * mu
    g = g + s["weight_decay"] * w
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    ahead = following * m / (1 - product * following) + (1 - mu) * g / (1 - product)
    out = {"step": t, "mu_product": product, "exp_avg": m, "exp_avg_sq": v}
    return w - lr * ahead / ((v / (1 - b2**t)).sqrt() + s["eps"]), out


def radam(w: Tensor, g: Tensor, state: State, s: Any) -> tuple[Tensor, State]:
    (b1, b2), lr, t = s["betas"], float(s["lr"]), int(state["step"]) + 1
    g = g + s["weight_decay"] * w
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    most = 2 / (1 - b2) - 1
    rho = most - 2 * t * b2**t / (1 - b2**t)
    step = m / (1 - b1**t)
    if rho > 5:
        r = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
        step = step * r * math.sqrt(1 - b2**t) / (v.sqrt() + s["eps"])
    return w - lr * step, {"step": t, "exp_avg": m, "exp_avg_sq": v}


def sgd(w: Tensor, g: Tensor, state: State, s: Any) -> tuple[Tensor, State]:
    g = -g if s["maximize"] else g
    g = g + s["weight_decay"] * w
    held = state.get("momentum_buffer")
    b = g if held is None else s["momentum"] * held + (1 - s["dampening"]) * g
    return w - float(s["lr"]) * (g + s["momentum"] * b if s["nesterov"] else b), {"momentum_buffer": b}


def rmsprop(w: Tensor, g: Tensor, state: State, s: Any) -> tuple[Tensor, State]:
    g = g + s["weight_decay"] * w
    v = s["alpha"] * state["square_avg"] + (1 - s["alpha"]) * g * g
    out = {"step": int(state["step"]) + 1, "square_avg": v}
    step = g / (v.sqrt() + s["eps"])
    if s["momentum"]:
        step = out["momentum_buffer"] = s["momentum"] * state["momentum_buffer"] + step
    return w - float(s["lr"]) * step, out


def adagrad(w: Tensor, g: Tensor, state: State, s: Any) -> tuple[Tensor, State]:
    t = int(state["step"]) + 1
    g = g + s["weight_decay"] * w
    total = state["sum"] + g * g
    rate = float(s["lr"]) / (1 + (t - 1) * s["lr_decay"])
    return w - rate * g / (total.sqrt() + s["eps"]), {"step": t, "sum": total}


Step = Callable[[Tensor, Tensor, State, Any], tuple[Tensor, State]]
ALL: dict[str, tuple[type[torch.optim.Optimizer], Step, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, adam, {"lr": 0.01}),
    "Adam L2": (torch.optim.Adam, adam, {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-3, "foreach": True}),
    "Adam amsgrad": (torch.optim.Adam, adam, {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.9)}),
    "Adam maximize": (torch.optim.Adam, adam, {"lr": torch.tensor(0.01), "maximize": True}),
    "AdamW": (torch.optim.AdamW, adamw, {"lr": 0.01, "weight_decay": 0.3}),
    "AdamW fused": (torch.optim.AdamW, adamw, {"lr": 0.01, "weight_decay": 0.3, "fused": True}),
    "NAdam": (torch.optim.NAdam, nadam, {"lr": 0.01, "weight_decay": 0.1}),
    "RAdam": (torch.optim.RAdam, radam, {"lr": 0.01, "betas": (0.9, 0.8)}),
    "SGD": (torch.optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD nesterov": (torch.optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "SGD dampened": (torch.optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "SGD fused": (torch.optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, rmsprop, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop momentum": (torch.optim.RMSprop, rmsprop, {"lr": 0.01, "momentum": 0.8, "alpha": 0.7}),
    "Adagrad": (torch.optim.Adagrad, adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
}
SIGNED = {"exp_avg", "momentum_buffer"}
FORMS_OF_4 = [name for name in ALL if name.startswith("Adam")]
every = pytest.mark.parametrize(("name", "bits"), [*((name, 8) for name in ALL), *((name, 4) for name in FORMS_OF_4)])


class Net(nn.Module):
    """Two matrices large enough to be quantised (one in blocks that do not come out even), and biases that are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(65, 67), nn.Linear(67, 70)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def build(name: str, model: nn.Module) -> torch.optim.Optimizer:
    kind, _, options = ALL[name]
    return kind(model.parameters(), **copy.deepcopy(options))


def backward(model: nn.Module, seed: int, factor: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 65, generator=draw)
    loss = (model(x) - x.sin().mean(1, keepdim=True)).square().mean()
    for param in model.parameters():
        param.grad = None
    (loss * factor).backward()
    return loss.detach()


def values(state: State, param: Tensor) -> State:
    """The state in float64, quantised or not."""
    tensors = {key: dequantise(v, param) if is_low(v) else v for key, v in state.items()}
    return {key: v.double() if isinstance(v, Tensor) else v for key, v in tensors.items()}


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return float(torch.cat([(a - b).detach().reshape(-1) for a, b in pairs]).norm())


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))


def assert_identical(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


@every
def test_each_step_is_the_one_by_hand_in_float64_from_the_state_that_was_kept(name: str, bits: int) -> None:
    model = Net()
    optimizer = build(name, model)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=bits)
    (group,) = optimizer.param_groups
    quantised = 0
    for number in range(4):
        backward(model, number)
        # Before the step: torch's multi-tensor Nesterov works in the gradients.
        before = [(p.detach().double(), p.grad.double(), values(optimizer.state[p], p)) for p in group["params"]]
        optimizer.step()
        for param, (weight, grad, state) in zip(group["params"], before, strict=True):
            fresh = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg")}
            fresh |= {"step": 0, "mu_product": 1.0}
            if name == "RMSprop momentum":
                fresh["momentum_buffer"] = torch.zeros_like(weight)
            want, after = ALL[name][1](weight, grad, {**fresh, **state}, group)
            # The step itself is one of float32: a few roundings of the weight and, relative to its length, of the
            # moments. A step with the other weight decay, or without bias correction, is off by 1e-3 and more.
            torch.testing.assert_close(param.double(), want, rtol=1e-6, atol=2e-7)
            kept = optimizer.state[param]
            for key, value in after.items():
                if is_low(kept[key]):
                    quantised += 1
                    assert (kept[key]["bits"], kept[key]["signed"]) == (bits, key in SIGNED)
                    got = dequantise(kept[key], param).double()
                    if bits == 8:
                        rounded = dequantise(quantise(value.float(), bits, key in SIGNED), param).double()
                        off = (got - rounded).abs()
                    else:  # by chance: one of two
                        rounded, other = around(value, key in SIGNED)
                        off = torch.minimum((got - rounded).abs(), (got - other).abs())
                    # Where float32's rounding is between two levels, the neighbour may be taken, rarely.
                    assert (off <= 1e-5 * got.abs() + 1e-12).float().mean() > 0.99, key
                else:
                    torch.testing.assert_close(
                        torch.as_tensor(kept[key], dtype=torch.float64),
                        torch.as_tensor(value, dtype=torch.float64),
                        rtol=1e-5,
                        atol=1e-6 if key == "momentum_buffer" else 1e-9,
                    )
    state_keys = {key for key in optimizer.state[model.one.weight] if key not in ("step", "mu_product")}
    assert quantised == 4 * 2 * len(state_keys), "all of the two matrices, nothing of the biases"


@every
@pytest.mark.parametrize("at", [0, 2])
def test_skipped_step_changes_nothing(name: str, bits: int, at: int) -> None:
    model = Net()
    optimizer = build(name, model)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=256.0, optimizer_bits=bits)
    for number in range(at):
        backward(model, number)
        optimizer.step()
    before = snapshot(model, optimizer)
    backward(model, 9, factor=math.inf)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()
    assert handle.step_was_skipped and handle.skipped_steps == 1
    assert_identical(snapshot(model, optimizer), before)
    backward(model, 10)
    optimizer.step()
    assert not handle.step_was_skipped
    assert not torch.equal(before[0]["one.weight"], model.one.weight)


@every
def test_unwrap_gives_32_bit_state_with_which_torch_goes_on(name: str, bits: int) -> None:
    model, plain = Net(), Net()
    optimizer, reference = build(name, model), build(name, plain)
    clean = set(vars(optimizer))
    own = {key: vars(optimizer).get(key) for key in ("_step_supports_amp_scaling", "step", "zero_grad")}
    handle = wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=bits)
    for number in range(6):
        if number == 3:
            handle.unwrap()
            assert {key: vars(optimizer).get(key) for key in own} == own and set(vars(optimizer)) == clean
            for param, state in optimizer.state.items():
                assert state.keys() == reference.state[next(iter(reference.state))].keys()
                for key, value in state.items():
                    assert isinstance(value, Tensor) and value.dtype is torch.float32, key
                    assert value.shape in (param.shape, ())
        for net, opt in ((model, optimizer), (plain, reference)):
            backward(net, number)
            opt.step()
    start = Net()
    moved, off = distance(plain, start), distance(plain, model)
    # In three steps quantised moments turn the update by their rounding: 1 % (8 bits) or 20 % (4 bits) of a value
    # near its block's largest, more of a small one. State that was lost (zeros) or left as codes is off by 0.5 and
    # more.
    assert off / moved < (0.1 if bits == 8 else 0.4)


@settings(max_examples=25)
@given(
    name=st.sampled_from([name for name in ALL if name not in ("SGD nesterov",)]),
    program=st.lists(
        st.sampled_from(["step", "step", "overflow", "checkpoint", "no gradients"]), min_size=2, max_size=8
    ),
)
def test_overflows_and_checkpoints_anywhere_leave_no_trace(name: str, program: list[str]) -> None:
    ends = []
    for plain in (True, False):
        model = Net()
        optimizer = build(name, model)
        handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=256.0, optimizer_bits=8)
        for number, action in enumerate(program):
            if action == "step":
                backward(model, number)
                optimizer.step()
            elif action == "overflow" and not plain:
                backward(model, number, factor=math.inf)
                optimizer.step()
                assert handle.step_was_skipped
            elif action == "checkpoint" and not plain:
                saved = copy.deepcopy(optimizer.state_dict())
                handle.unwrap()
                optimizer = build(name, model)
                handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=256.0, optimizer_bits=8)
                optimizer.load_state_dict(saved)
                handle.load_state_dict(handle.state_dict())
            elif action == "no gradients":
                optimizer.zero_grad()
                optimizer.step()
        ends.append(snapshot(model, optimizer))
    assert_identical(*ends)


# State that is there already, checkpoints


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "RMSprop momentum", "NAdam"])
def test_state_that_is_there_is_quantised_by_wrap(name: str) -> None:
    model = Net()
    optimizer = build(name, model)
    for number in range(3):
        backward(model, number)
        optimizer.step()
    before = copy.deepcopy(optimizer.state[model.one.weight])
    wrapprec.wrap(model, optimizer, "bf16-mixed", optimizer_bits=8)
    kept = optimizer.state[model.one.weight]
    assert before.keys() == kept.keys() and any(is_low(value) for value in kept.values())
    for key, value in before.items():
        if is_low(kept[key]):
            assert_identical(kept[key], quantise(value, 8, key in SIGNED))
        else:
            assert torch.equal(kept[key], value)


@every
def test_checkpoint_is_loaded_to_the_bit_and_with_weights_only(name: str, bits: int) -> None:
    runs = []
    for resumed in (False, True):
        model = Net()
        optimizer = build(name, model)
        handle = wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=bits)
        for number in range(4):
            if resumed and number == 2:
                file = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), file)
                file.seek(0)
                weights, state = torch.load(file, weights_only=True)
                handle.unwrap()
                model = Net()
                optimizer = build(name, model)
                handle = wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=bits)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
                snapshot_of_file = copy.deepcopy(state)
            backward(model, number)
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert_identical(runs[0], runs[1])
    # torch goes on counting in the dict that it was given; ours stays as it is.
    for mine, before in zip(state["state"].values(), snapshot_of_file["state"].values(), strict=True):
        assert_identical(*({k: v for k, v in entry.items() if is_low(v)} for entry in (mine, before)))


@pytest.mark.parametrize("when", ["before wrap", "after wrap"])
@pytest.mark.parametrize("saved_bits", [8, 4, 32])
def test_checkpoint_of_any_bits_is_taken_by_an_optimizer_of_8(saved_bits: int, when: str) -> None:
    saver, source = Net(), None
    source = build("AdamW", saver)
    handle = wrapprec.wrap(saver, source, "32-true", **({} if saved_bits == 32 else {"optimizer_bits": saved_bits}))
    for number in range(3):
        backward(saver, number)
        source.step()
    saved = copy.deepcopy(source.state_dict())
    handle.unwrap()
    model = Net()
    optimizer = build("AdamW", model)
    if when == "before wrap":
        optimizer.load_state_dict(saved)
        wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    else:
        wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
        optimizer.load_state_dict(saved)
    for mine, theirs in zip(model.parameters(), saver.parameters(), strict=True):
        for key, value in optimizer.state[mine].items():
            want = source.state[theirs][key]
            if is_low(value):
                want = want if saved_bits == 8 else quantise(want, 8, key in SIGNED)
                want = want if isinstance(want, Tensor) else dequantise(want, mine)
                torch.testing.assert_close(dequantise(value, mine), want, rtol=0, atol=0)
            else:
                assert torch.equal(value, want)
    backward(model, 3)
    optimizer.step()


@pytest.mark.parametrize(
    "name", ["AdamW", "AdamW fused", "Adam L2", "SGD", "SGD fused", "RMSprop", "Adagrad", "NAdam", "RAdam"]
)
def test_optimizer_that_was_never_converted_does_not_compute_with_codes(name: str) -> None:
    model = Net()
    optimizer = build(name, model)
    handle = wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    backward(model, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    handle.unwrap()
    plain = build(name, model)
    plain.load_state_dict(saved)
    with pytest.raises((TypeError, AttributeError, RuntimeError, KeyError)):
        plain.step()
    with pytest.raises((TypeError, AttributeError, RuntimeError, KeyError)):
        copied = copy.deepcopy(plain)
        for param in copied.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        copied.step()


def test_state_of_bitsandbytes_is_not_taken_for_ours() -> None:
    import bitsandbytes

    model = Net()
    theirs = bitsandbytes.optim.AdamW8bit(model.parameters())
    backward(model, 0)
    theirs.step()
    optimizer = build("AdamW", model)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    with pytest.raises(wrapprec.errors.StepError) as caught:
        optimizer.load_state_dict(theirs.state_dict())
    assert "Received: the state of an optimizer of bitsandbytes" in str(caught.value)
    assert "Remedy: load it into that optimizer" in str(caught.value)
