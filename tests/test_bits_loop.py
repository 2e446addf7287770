"""An optimizer whose state has few bits stays the loop's own: schedulers, groups, hooks, closures, errors."""

from __future__ import annotations

import copy
import functools
import gc
import math
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewbits import few_bits, need_torchao  # noqa: F401  a fixture of every test
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import wrapprec
from wrapprec import PolicyError
from wrapprec.lowbit import optimizer as lowbit
from wrapprec.lowbit.codes import dequantise, is_low, size
from wrapprec.undo import UndoStack


def make(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def train(model: nn.Module, optimizer: Optimizer, steps: int, after: Callable[[], object] = lambda: None) -> float:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        after()
    return float(loss.detach())


def low(optimizer: Optimizer, param: Tensor) -> set[str]:
    """The names of the state that is quantised."""
    return {key for key, value in optimizer.state[param].items() if is_low(value)}


def adamw(model: nn.Module, **options: Any) -> AdamW:
    return AdamW(model.parameters(), **{"lr": 1e-3, **options})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


# The loop


@pytest.mark.parametrize("policy", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("built", ["before", "after"])
def test_scheduler_goes_on_and_the_rate_is_obeyed(policy: str, built: str) -> None:
    model, plain = make(), make()
    optimizer, reference = adamw(model), adamw(plain)
    schedule = {"before": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)}
    scheduler = schedule["before"]() if built == "before" else None
    handle = wrapprec.wrap(model, optimizer, policy, optimizer_bits=8)
    scheduler = scheduler or schedule["before"]()
    theirs = torch.optim.lr_scheduler.StepLR(reference, 1, 0.1)
    train(model, optimizer, 3, scheduler.step)
    train(plain, reference, 3, theirs.step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)
    assert low(optimizer, model[0].weight) == {"exp_avg", "exp_avg_sq"}
    moved = (weights(plain) - weights(make())).norm()
    # The first step, from no state, is exact but for the policy; the ones after are 1/10 and 1/100 of it.
    assert (weights(model) - weights(plain)).norm() < (0.02 if policy == "32-true" else 0.3) * moved
    handle.unwrap()
    train(model, optimizer, 1, scheduler.step)
    assert low(optimizer, model[0].weight) == set()


def test_scheduler_built_before_does_not_warn_after_a_skipped_first_step() -> None:
    model = make()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    wrapprec.wrap(model, optimizer, "16-mixed", optimizer_bits=8)
    (model(torch.ones(1, 64)).sum() * math.inf).backward()
    optimizer.step()
    scheduler.step()


def test_hooks_of_the_step_run_once_however_many_parts_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit, "_AT_ONCE", 1)
    model = make()
    optimizer = AdamW([{"params": [p]} for p in model.parameters()])
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    calls: list[tuple[str, Any, int]] = []
    optimizer.register_step_pre_hook(lambda o, *_: calls.append(("before", o, len(o.param_groups))))
    optimizer.register_step_post_hook(lambda o, *_: calls.append(("after", o, len(o.param_groups))))
    train(model, optimizer, 1)
    assert calls == [("before", optimizer, 4), ("after", optimizer, 4)]


def test_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for at_once in (1, 5000, 2**24):
        monkeypatch.setattr(lowbit, "_AT_ONCE", at_once)
        model = make()
        optimizer = adamw(model)
        wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
        train(model, optimizer, 3)
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[1], ends[2])


def test_no_more_than_one_part_of_the_state_is_in_32_bits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit, "_AT_ONCE", 5000)
    model = make()
    optimizer = adamw(model)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    train(model, optimizer, 1)
    wide: list[int] = []
    inner = lowbit.dequantise

    def spy(*args: Any) -> Tensor:
        wide.append(sum(isinstance(s["exp_avg"], Tensor) for p, s in optimizer.state.items() if p.numel() >= 4096))
        return inner(*args)

    monkeypatch.setattr(lowbit, "dequantise", spy)
    train(model, optimizer, 1)
    assert len(wide) == 4 and max(wide) == 0


def test_group_added_later_is_quantised_too() -> None:
    model = make()
    optimizer = AdamW(model[0].parameters(), lr=1e-3)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 1e-4})
    train(model, optimizer, 1)
    assert low(optimizer, model[2].weight) == {"exp_avg", "exp_avg_sq"}


def test_parameters_without_gradients_are_left_alone() -> None:
    model = make()
    optimizer = adamw(model, weight_decay=0.5)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    before = model[2].weight.detach().clone()
    model[0](torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert torch.equal(model[2].weight, before) and model[2].weight not in optimizer.state


@pytest.mark.parametrize("policy", ["32-true", "16-mixed"])
def test_closure_is_evaluated_once_and_its_loss_comes_back(policy: str) -> None:
    model = make()
    optimizer = adamw(model)
    wrapprec.wrap(model, optimizer, policy, optimizer_bits=8)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(model(torch.ones(2, 64)).square().mean())
        losses[-1].backward()
        return losses[-1]

    for number in (1, 2):
        assert optimizer.step(closure) is losses[-1] and len(losses) == number
    assert losses[1] < losses[0] and low(optimizer, model[0].weight)


def test_weights_that_never_have_a_gradient_do_not_move() -> None:
    model = make()
    optimizer = adamw(model, weight_decay=0.0)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    before = model[0].weight.detach().clone()
    for seed in range(5):
        model[0].weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        model[0].weight.grad[:, 40:] = 0
        optimizer.step()
    moved = model[0].weight.detach() != before
    assert moved[:, :40].all() and not moved[:, 40:].any()


def test_a_gradient_that_stays_away_does_not_make_a_step_explode() -> None:
    # The second moment of the small ones is 1e-8 of the block's largest, for which 8 bits have no level but zero; the
    # first one, 1e-4 of it, stays. Divided by epsilon alone it would move the weights by 100 times the rate and more.
    model = make()
    optimizer = adamw(model, weight_decay=0.0)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    grad = torch.where(torch.arange(4096) % 2 == 0, 1.0, 1e-4).view(64, 64)
    before = model[0].weight.detach().clone()
    for factor in (1.0, 1.0, 1.0, 0.0, 0.0):
        model[0].weight.grad = grad * factor
        optimizer.step()
    assert (model[0].weight.detach() - before).abs().max() <= 5 * 1e-3


def test_step_that_somebody_replaced_is_called_once_and_sees_32_bits() -> None:
    model = make()
    optimizer = adamw(model)
    seen: list[set[str]] = []

    def step(self: Optimizer, *args: Any) -> Any:
        seen.append(low(self, model[0].weight))
        return AdamW.step(self, *args)

    optimizer.step = types.MethodType(step, optimizer)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", optimizer_bits=8)
    train(model, optimizer, 2)
    assert seen == [set(), set()] and low(optimizer, model[0].weight) == {"exp_avg", "exp_avg_sq"}
    handle.unwrap()
    assert vars(optimizer)["step"].__func__ is step


def test_users_grad_scaler_skips_a_fused_optimizer_without_a_trace() -> None:
    model = make()
    optimizer = adamw(model, fused=True)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True):
        before = weights(model), copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        # Negative, because 8 bits have no level of -1: rounding a second time would show.
        scaler.scale(model(torch.ones(1, 64)).sum() * -(math.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(weights(model), before[0])
    kept, entry = optimizer.state_dict()["state"][0], before[1]["state"][0]
    assert torch.equal(kept["exp_avg"]["absmax"], entry["exp_avg"]["absmax"]) and kept["step"] == entry["step"]


def test_step_that_fails_leaves_the_state_as_it_was() -> None:
    model = make()
    optimizer = adamw(model)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    model[2].bias.grad = torch.ones(64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    after = optimizer.state_dict()["state"]
    for number in (0, 2):
        for key in ("exp_avg", "exp_avg_sq"):
            for part in ("codes", "absmax"):
                assert torch.equal(after[number][key][part], before[number][key][part])


def test_distributed_checkpoints_take_the_state() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    models = make(), make()
    optimizers = [adamw(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    train(models[0], optimizers[0], 2)
    set_optimizer_state_dict(models[1], optimizers[1], get_optimizer_state_dict(models[0], optimizers[0]))
    mine, theirs = (o.state[m[0].weight]["exp_avg"] for o, m in zip(optimizers, models, strict=True))
    assert torch.equal(mine["codes"], theirs["codes"]) and torch.equal(mine["absmax"], theirs["absmax"])


def test_compiled_step_trains() -> None:
    model = make()
    optimizer = adamw(model)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    train(model, optimizer, 1)
    model[0].weight.grad = torch.ones(64, 64)
    before = weights(model)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert not torch.equal(weights(model), before) and low(optimizer, model[0].weight)


def test_accelerate_prepares_a_converted_optimizer() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = make()
    optimizer = adamw(model)
    handle = wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state[model[0].weight]["exp_avg"])
    try:
        prepared_model, prepared = Accelerator(cpu=True, mixed_precision="no").prepare(model, optimizer)
        kept = optimizer.state[model[0].weight]["exp_avg"]
        assert torch.equal(kept["codes"], before["codes"]) and torch.equal(kept["absmax"], before["absmax"])
        train(prepared_model, prepared, 1)
    finally:
        AcceleratorState._reset_state(True)
    assert low(optimizer, model[0].weight) == {"exp_avg", "exp_avg_sq"}
    handle.unwrap()


# What stays in 32 bits


def test_embeddings_and_small_tensors_keep_32_bits() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(100, 64),
            "bag": nn.EmbeddingBag(100, 64),
            "normed": nn.utils.parametrizations.weight_norm(nn.Embedding(100, 64)),
            "head": nn.Linear(64, 100, bias=False),
            "just": nn.Linear(64, 64),
            "under": nn.Linear(63, 65),
        }
    )
    model["head"].weight = model["words"].weight
    optimizer = adamw(model)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    names = {name for name, param in model.named_parameters() if low(optimizer, param)}
    assert names == {"just.weight"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda params: AdamW(params), "AdamW: exp_avg, exp_avg_sq in 8 bits for 1 of 2 parameters;"),
        (lambda params: AdamW(params, amsgrad=True), "AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq in 8 bits for 1 of 2"),
        (lambda params: SGD(params, lr=0.1, momentum=0.9), "SGD: momentum_buffer in 8 bits for 1 of 2 parameters;"),
        (lambda params: SGD(params, lr=0.1), "SGD: no state, so none in 8 bits"),
        (lambda params: torch.optim.RMSprop(params), "RMSprop: square_avg in 8 bits for 1 of 2 parameters;"),
    ],
)
def test_explain_names_the_state_that_there_is(make: Any, said: str) -> None:
    model = nn.Linear(64, 64)
    optimizer = make(model.parameters())
    handle = wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    line = handle.explain().splitlines()[-1]
    assert line.startswith(said)
    named = line.partition(": ")[2].partition(" in ")[0].split(", ")
    assert {key for key in optimizer.state[model.weight] if is_low(optimizer.state[model.weight][key])} <= {*named}
    assert named[0].startswith("no") or all(key in optimizer.state[model.weight] for key in named)


def test_what_stands_in_for_a_parameter_is_kept_as_it_is() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64)).bfloat16()
    optimizer = adamw(model)
    lowbit.convert(optimizer, 8, lambda: [model[0].weight], UndoStack())
    params = list(model.parameters())
    for number, param in enumerate(params):
        wide = nn.Parameter(param.detach().float())
        wide.stands_for, wide.grad = param, torch.ones_like(wide)
        optimizer.param_groups[0]["params"][number] = wide
    embedding, weight, bias = optimizer.param_groups[0]["params"]
    optimizer.step()
    assert low(optimizer, embedding) == set() and low(optimizer, weight) == {"exp_avg", "exp_avg_sq"}
    # The state of a stand-in is that of the parameter afterwards, and stays in float32 when it is wide again.
    optimizer.param_groups[0]["params"][:] = params
    for param, wide in zip(params, (embedding, weight, bias), strict=True):
        optimizer.state[param] = optimizer.state.pop(wide)
    optimizer.load_state_dict(optimizer.state_dict())
    for value in values_of(optimizer, params[1]):
        assert value.dtype is torch.float32


def values_of(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    return [dequantise(value, param) for value in optimizer.state[param].values() if is_low(value)]


def test_float64_parameters_keep_the_state_that_they_have() -> None:
    model = make().double()
    optimizer = adamw(model)
    lowbit.convert(optimizer, 8, lambda: [], UndoStack())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].dtype is torch.float64


@pytest.mark.parametrize(("bits", "most"), [(8, 0.30), (4, 0.15)])
def test_bytes_of_the_state_on_large_matrices(bits: int, most: float) -> None:
    model = make(256)
    plain, optimizer = adamw(make(256)), adamw(model)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=bits)
    held = []
    for opt in (optimizer, plain):
        for param in opt.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        opt.step()
        values = [value for state in opt.state.values() for value in state.values()]
        held.append(sum(size(value) if is_low(value) else value.nbytes for value in values))
    assert held[0] <= most * held[1]


# Whole runs


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def run_digits(bits: int | None, kind: Callable[..., Optimizer], steps: int = 60) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = digits()
    optimizer = kind(model.parameters())
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=bits)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    if bits is not None:
        assert all(low(optimizer, model[number].weight) for number in (0, 2))
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


@pytest.mark.parametrize(
    "kind",
    [lambda p: AdamW(p, lr=2e-3), lambda p: SGD(p, lr=0.05, momentum=0.9), lambda p: torch.optim.RMSprop(p, lr=1e-3)],
    ids=["AdamW", "SGD", "RMSprop"],
)
def test_digits_end_within_two_per_cent_of_32_bits(kind: Callable[..., Optimizer]) -> None:
    wide, narrow = run_digits(None, kind), run_digits(8, kind)
    assert wide < 0.8, "the reference has learnt"
    assert narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize("steps", [60, 200])
def test_digits_end_no_more_than_two_per_cent_above_32_bits_with_4(steps: int) -> None:
    """Below is well: chance makes some steps longer, and these runs are short of their minimum."""
    need_torchao()
    wide, narrow = (run_digits(bits, lambda params: AdamW(params, lr=2e-3), steps) for bits in (None, 4))
    assert 0.9 * wide < narrow < 1.02 * wide


@pytest.mark.parametrize("bits", [8, 4])
def test_character_gpt_ends_within_two_per_cent_of_32_bits(bits: int) -> None:
    assert run_gpt(bits) == pytest.approx(run_gpt(None), rel=0.02)


@functools.cache
def run_gpt(bits: int | None) -> float:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    try:
        import gpt
    finally:
        sys.path.pop(0)
    text = gpt.read_text(small=True)
    symbols = sorted(set(text))
    data = torch.tensor([symbols.index(c) for c in text])
    torch.manual_seed(0)
    model = gpt.GPT(len(symbols), width=64, depth=2, dropout=0.0)
    optimizer = adamw(model, lr=3e-3)
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=bits)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        starts = torch.randint(len(data) - 33, (8,), generator=draw)
        rows = torch.stack([data[start : start + 33] for start in starts])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # One batch's loss is noise; the same batches in all runs, ten of them.
    end = sum(losses[-10:]) / 10
    assert end < 0.75 * math.log(len(symbols)), "it has learnt"
    return end


# Several optimizers, later ones, freed ones


def test_optimizer_attached_later_has_the_bits_of_wrap_or_its_own() -> None:
    need_torchao()
    model = make()
    handle = wrapprec.wrap(model, policy="16-mixed", optimizer_bits=8)
    first, second = AdamW(model[0].parameters()), AdamW(model[2].parameters())
    handle.attach(first)
    handle.attach(first)
    handle.attach(second, optimizer_bits=4)
    for optimizer in (first, second):
        train(model, optimizer, 1)
    assert first.state[model[0].weight]["exp_avg"]["bits"] == 8
    assert second.state[model[2].weight]["exp_avg"]["bits"] == 4
    assert "AdamW: exp_avg, exp_avg_sq in 4 bits for 1 of 2 parameters" in handle.explain()
    handle.unwrap()
    assert not low(first, model[0].weight) and not low(second, model[2].weight)


def test_several_optimizers_are_converted_each_in_its_form() -> None:
    model = make()
    first = AdamW(model[0].parameters())
    second = SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    with wrapprec.wrap(model, [first, second], "16-mixed", optimizer_bits=8) as handle:
        train(model, first, 1)
        train(model, second, 1)
        assert low(first, model[0].weight) == {"exp_avg", "exp_avg_sq"}
        assert low(second, model[2].weight) == {"momentum_buffer"}
        lines = handle.explain().splitlines()
        assert lines[-1] == (
            "SGD: momentum_buffer in 8 bits for 1 of 2 parameters; embeddings and tensors of fewer than 4,096 elements"
            " keep 32"
        )


def test_wrap_that_is_not_enabled_converts_nothing() -> None:
    model = make()
    optimizer = adamw(model)
    wrapprec.wrap(model, optimizer, "bf16-mixed", optimizer_bits=8, enabled=False)
    train(model, optimizer, 1)
    assert not low(optimizer, model[0].weight) and "step" not in vars(optimizer)


@pytest.mark.parametrize("policy", ["32-true", "16-mixed"])
def test_an_optimizer_that_is_dropped_is_freed(policy: str) -> None:
    model = make()
    handle = wrapprec.wrap(model, policy=policy, optimizer_bits=8)
    optimizer = adamw(model)
    handle.attach(optimizer)
    train(model, optimizer, 1)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    handle.unwrap()


# Errors


class Own(AdamW):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["exp_avg"] = param.grad


class Same(AdamW):
    pass


def refusal(optimizer: Optimizer, model: nn.Module, bits: Any = 8) -> str:
    before = vars(optimizer).copy(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(PolicyError) as caught:
        wrapprec.wrap(model, optimizer, "16-mixed", optimizer_bits=bits)
    assert vars(optimizer) == before[0] and optimizer.state_dict() == before[1]
    assert wrapprec.handle_of(model) is None
    return str(caught.value)


@pytest.mark.parametrize("kind", [torch.optim.Adamax, torch.optim.Adadelta, torch.optim.LBFGS, torch.optim.Rprop, Own])
def test_optimizer_without_a_form_is_refused_with_a_list_of_those_that_have_one(kind: Any) -> None:
    model = make()
    text = refusal(kind(model.parameters()), model)
    assert "a form with 8-bit state: Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop, SGD." in text
    assert f"Received: {kind.__name__} (of " in text
    assert "Remedy: use one of these, or leave optimizer_bits out" in text


def test_subclass_that_steps_as_torch_does_is_taken() -> None:
    model = make()
    optimizer = Same(model.parameters())
    wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    train(model, optimizer, 1)
    assert low(optimizer, model[0].weight) == {"exp_avg", "exp_avg_sq"}


def test_four_bits_are_for_adam() -> None:
    model = make()
    text = refusal(SGD(model.parameters(), lr=0.1, momentum=0.9), model, 4)
    assert "a form with 4-bit state: Adam, AdamW." in text and "Received: SGD (of torch.optim.sgd)" in text


@pytest.mark.parametrize("bits", [3, 16, "8", 8.5])
def test_other_numbers_of_bits_are_refused(bits: Any) -> None:
    model = make()
    text = refusal(adamw(model), model, bits)
    assert text.startswith("Expected optimizer_bits of 8 or 4, or None.") and f"Received: {bits!r}" in text


@pytest.mark.parametrize(
    ("setting", "kind", "reason"),
    [
        ("centered", torch.optim.RMSprop, "may be negative"),
        ("differentiable", AdamW, "does not pass through rounding"),
        ("capturable", AdamW, "a captured graph would not see"),
    ],
)
def test_settings_that_quantised_state_cannot_serve_are_refused(setting: str, kind: Any, reason: str) -> None:
    model = make()
    text = refusal(kind(model.parameters(), **{setting: True}), model)
    assert reason in text and f"Received: {setting}=True" in text and "Where: param_groups[0]" in text
    assert f"Remedy: build it with {setting}=False" in text


class Sharded(nn.Parameter):
    """As DTensors do, it has a part of its own."""

    def to_local(self) -> Tensor:
        return self.detach()


def test_sharded_parameters_are_refused() -> None:
    model = make()
    model[2].weight = Sharded(model[2].weight.detach())
    text = refusal(adamw(model), model)
    assert "Received: a Sharded of shape (64, 64), as fully_shard makes them" in text
    assert "Remedy: leave optimizer_bits out, and build torchao.optim.AdamW8bit or AdamW4bit after sharding" in text


def test_other_bits_for_a_converted_optimizer_are_refused() -> None:
    model = make()
    optimizer = adamw(model)
    handle = wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=8)
    with pytest.raises(PolicyError, match="Expected optimizer_bits=8, which this AdamW was converted to"):
        handle.attach(optimizer, optimizer_bits=4)


def test_bits_for_an_optimizer_that_is_guarded_already_are_refused() -> None:
    model = make()
    optimizer = adamw(model)
    handle = wrapprec.wrap(model, optimizer, "16-mixed")
    with pytest.raises(PolicyError) as caught:
        handle.attach(optimizer, optimizer_bits=8)
    assert "Received: AdamW, whose steps are guarded already" in str(caught.value)
    train(model, optimizer, 1)
    assert not low(optimizer, model[0].weight)


def test_wrap_that_fails_later_has_rounded_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    first, second = AdamW(model[0].parameters()), AdamW(model[2].parameters())
    train(model, first, 1)
    before, own = copy.deepcopy(first.state_dict()), vars(first).copy()
    attach = wrapprec.Handle.attach

    def fail(self: Any, optimizer: Any, *args: Any) -> None:
        if optimizer is second:
            raise RuntimeError("later")
        attach(self, optimizer, *args)

    monkeypatch.setattr(wrapprec.Handle, "attach", fail)
    with pytest.raises(RuntimeError, match="later"):
        wrapprec.wrap(model, [first, second], "16-mixed", optimizer_bits=8)
    assert vars(first) == own
    for key, value in first.state_dict()["state"][0].items():
        assert torch.equal(value, before["state"][0][key])
