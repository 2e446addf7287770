"""Casts and autocast at the borders between precisions: who computes in what, and what comes back."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections import namedtuple
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wrapprec
from wrapprec import ModelChangedError, Policy, Precision, Rule

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
FOUR = ["16-mixed", "16-module", "bf16-mixed", "bf16-module"]
MODULE = ["16-module", "bf16-module"]
LOW = {"16-mixed": F16, "16-module": F16, "bf16-mixed": BF16, "bf16-module": BF16}
each_policy = pytest.mark.parametrize("policy", FOUR)


class Probe(nn.Module):
    """A linear layer that notes the dtypes of what it is given, computes and owns while it runs."""

    def __init__(self, *below: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.below = nn.ModuleList(below)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["input"] = x.dtype
        out: Tensor = self.layer(x)
        self.seen["computed"] = out.dtype
        self.seen["weight"] = self.layer.weight.dtype
        for module in self.below:
            out = module(out)
            self.seen["child"] = out.dtype
        return out


def run(model: nn.Module, policy: Any, **options: Any) -> Tensor:
    wrapprec.wrap(model, policy=policy, **options)
    out: Tensor = model(torch.randn(4, 8))
    (out.float().mean() * 1e-2).backward()
    assert all(p.dtype == F32 and (p.grad is None or p.grad.dtype == F32) for p in model.parameters())
    return out


@each_policy
def test_low_precision_is_computed_inside_and_float32_comes_out(policy: str) -> None:
    model = Probe()
    out = run(model, policy)
    assert model.seen["computed"] == LOW[policy] and out.dtype == F32
    assert model.seen["input"] == (LOW[policy] if policy in MODULE else F32)
    assert model.seen["weight"] == (LOW[policy] if policy in MODULE else F32)


@each_policy
def test_islands_and_low_children_alternate_to_any_depth(policy: str) -> None:
    fifth = Probe()
    fourth = Probe(fifth)
    third = Probe(fourth)
    second = Probe(third)
    first = Probe(second)
    low = policy
    names = ["below.0", "below.0.below.0", "below.0.below.0.below.0", "below.0.below.0.below.0.below.0"]
    rules = [(name, "float32" if i % 2 == 0 else low) for i, name in enumerate(names)]
    out = run(first, policy, rules=rules)
    for depth, probe in enumerate([first, second, third, fourth, fifth]):
        assert probe.seen["computed"] == (F32 if depth % 2 else LOW[policy])
        assert probe.seen["weight"] == (LOW[policy] if policy in MODULE and depth % 2 == 0 else F32)
    # An island gets float32, and a low child of a float32 parent answers in its output dtype.
    assert second.seen["input"] == F32 and fourth.seen["input"] == F32
    assert second.seen["child"] == F32 and fourth.seen["child"] == F32 and out.dtype == F32


@each_policy
def test_low_child_of_a_float32_model_answers_in_its_output_dtype(policy: str) -> None:
    child, model = Probe(), None
    model = Probe(child)
    out = run(model, "32-true", rules=[("below.0", policy)])
    assert (model.seen["computed"], child.seen["computed"], model.seen["child"]) == (F32, LOW[policy], F32)
    assert out.dtype == F32
    child, model = Probe(), None
    model = Probe(child)
    precision = Precision(F32, LOW[policy], BF16, "op" if "mixed" in policy else "module")
    run(model, "32-true", rules=[("below.0", precision)], loss_scale="none")
    assert model.seen["child"] == BF16


@each_policy
def test_output_dtype_is_what_the_policy_says_also_for_a_submodule(policy: str) -> None:
    base = Policy.parse(policy)
    model = Probe(Probe())
    out = run(model, dataclasses.replace(base, output_dtype=BF16))
    assert out.dtype == BF16 and model.below[0](torch.randn(2, 8)).dtype == BF16


@each_policy
def test_cast_inputs_decides_whether_the_model_sees_its_inputs_as_they_are(policy: str) -> None:
    for wanted in (True, False):
        if policy in MODULE and not wanted:
            continue  # every weight there is low already: the next test
        model = Probe()
        wrapprec.wrap(model, policy=dataclasses.replace(Policy.parse(policy), cast_inputs=wanted))
        model(torch.randn(2, 8))
        assert model.seen["input"] == (LOW[policy] if wanted else F32)


@pytest.mark.parametrize("policy", MODULE)
def test_module_casting_without_cast_inputs_leaves_casting_to_the_model(policy: str) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.dtypes = nn.Linear(8, 8), []

        def forward(self, x: Tensor) -> Tensor:
            self.dtypes.append(x.dtype)
            out: Tensor = self.layer(x.to(self.layer.weight.dtype))
            return out

    model = Casts()
    wrapprec.wrap(model, policy=dataclasses.replace(Policy.parse(policy), cast_inputs=False))
    assert model(torch.randn(2, 8)).dtype == F32 and model.dtypes == [F32]


@each_policy
def test_addition_with_a_float32_buffer_does_not_break_the_next_layer(policy: str) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.register_buffer("offset", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            assert self.offset.dtype == F32
            out: Tensor = self.second(self.first(x) + self.offset)
            return out

    run(Adds(), policy)


@each_policy
def test_norms_keep_float32_statistics_and_the_surrounding_dtype(policy: str) -> None:
    class HandNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.dtypes = nn.Parameter(torch.ones(8)), []

        def forward(self, x: Tensor) -> Tensor:
            self.dtypes.append((x.dtype, self.gain.dtype))
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.gain

    after = Probe()
    hand = HandNorm()
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), hand, after)
    run(model, policy)
    assert hand.dtypes == [(F32, F32)]
    assert model[1].running_mean.dtype == F32 and model[1].running_mean.abs().sum() > 0
    assert after.seen["input"] == (LOW[policy] if policy in MODULE else F32)


# Structures

Pair = namedtuple("Pair", "x label")


class Typed(NamedTuple):
    x: Tensor
    count: int


@dataclasses.dataclass
class Data:
    x: Tensor
    more: dict[str, Any]


class Walks(nn.Module):
    """Gives back the structures it was given, with tensors computed from the ones in them, and notes their dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dtypes = nn.Linear(8, 8), {}

    def forward(self, first: Any, *rest: Any, **named: Any) -> Any:
        self.dtypes = {"first": self._dtype(first), **{k: self._dtype(v) for k, v in named.items()}}
        return (self._make(first), *map(self._make, rest)), {k: self._make(v) for k, v in named.items()}

    def _dtype(self, value: Any) -> Any:
        x = value[0] if isinstance(value, (tuple, list)) else value["x"] if isinstance(value, dict) else value
        return x.x.dtype if dataclasses.is_dataclass(x) and not isinstance(x, dict) else x.dtype

    def _make(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.layer(value) if value.dtype in (F32, F16, BF16) else value
        if isinstance(value, (Pair, Typed)):
            return type(value)(self._make(value.x), value[1])
        if dataclasses.is_dataclass(value) and not isinstance(value, dict):
            return type(value)(self._make(value.x), {k: self._make(v) for k, v in value.more.items()})
        if isinstance(value, dict):
            return type(value)({k: self._make(v) for k, v in value.items()})
        return type(value)(map(self._make, value)) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("policy", FOUR)
def test_structures_keep_their_types_and_what_is_not_half_the_range_keeps_its_dtype(policy: str) -> None:
    model = Walks()
    wrapprec.wrap(model, policy=policy)
    x = torch.randn(2, 8)
    others = {
        "ints": torch.arange(3),
        "bools": torch.tensor([True]),
        "complex": torch.ones(2, dtype=torch.complex64),
        "double": torch.ones(2, dtype=F64),
    }
    given = (Pair(x, "a"), Typed(x, 3), Data(x, {"deep": [x, (x, {"y": x})]}), [x], 5, None, "text")
    out, named = model(*given, key=Data(x, {"same": x}), pair=Pair(x, 1), **others)
    for before, after in zip(given, out, strict=True):
        assert type(before) is type(after)
    assert out[0].x.dtype == F32 and out[0].label == "a" and out[1].count == 3
    assert out[2].x.dtype == F32 and out[2].more["deep"][1][1]["y"].dtype == F32 and out[4:] == (5, None, "text")
    assert type(named["key"]) is Data and named["key"].more["same"].dtype == F32 and named["pair"].x.dtype == F32
    expected = LOW[policy] if policy in MODULE else F32
    assert model.dtypes["first"] == expected and model.dtypes["key"] == expected and model.dtypes["pair"] == expected
    for name, tensor in others.items():
        assert model.dtypes[name] == tensor.dtype and named[name].dtype == tensor.dtype
        assert named[name] is tensor or tensor.requires_grad


@each_policy
def test_model_output_of_hugging_face_keeps_its_type_and_its_two_ways_of_access(policy: str) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, given: Any = None) -> Any:
            if given is not None:
                assert type(given) is outputs.BaseModelOutput
                assert given.last_hidden_state.dtype == (LOW[policy] if policy in MODULE else F32)
                x = given.last_hidden_state
            hidden = self.layer(x)
            return outputs.BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden, x))

    model = Answers()
    wrapprec.wrap(model, policy=policy, loss_scale=8 if policy.startswith("16") else None)
    out = model(torch.randn(2, 8))
    out = model(torch.randn(2, 8), given=out)
    assert type(out) is outputs.BaseModelOutput
    assert out.last_hidden_state is out["last_hidden_state"] and out[0].dtype == F32
    assert out.hidden_states[0].dtype == F32
    out.last_hidden_state.sum().backward()


# Writing into inputs


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Any, position: int) -> Tensor:
        value = self.layer(x)
        if isinstance(cache, list):
            cache[0][position] = value
            cache.append(value)
        else:
            cache[position] = value
        return value


@each_policy
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_write_into_a_cache_that_was_cast_is_copied_back(policy: str, mode: str, dtype: torch.dtype) -> None:
    model = Cache()
    handle = wrapprec.wrap(model, policy=dataclasses.replace(Policy.parse(policy), cast_inputs=True))
    x = torch.randn(8)
    for inside in (False, True):
        context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": handle.frozen}[mode]()
        cache = None if inside else torch.zeros(3, 8, dtype=dtype)
        with context:
            cache = torch.zeros(3, 8, dtype=dtype) if cache is None else cache
            out = model(x, cache, 1)
            listed = [torch.zeros(3, 8, dtype=dtype)]
            first = listed[0]
            model(x, listed, 2)
        assert torch.equal(cache[1].float(), out.to(LOW[policy]).to(dtype).float()) and cache[0].abs().sum() == 0
        assert listed[0] is first and first[2].abs().sum() > 0 and len(listed) == 2


@pytest.mark.parametrize("policy", MODULE)
def test_write_that_gradients_would_go_through_raises_with_the_remedy(policy: str) -> None:
    model = Cache()
    wrapprec.wrap(model, policy=policy)
    with pytest.raises(ModelChangedError, match="modified in place"):
        model(torch.randn(8), torch.zeros(3, 8), 1)
    assert type(model.layer._parameters) is dict


@pytest.mark.parametrize("policy", MODULE)
def test_cache_in_a_list_keeps_what_forward_put_in_under_gradients_too(policy: str) -> None:
    class Appends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, cache: dict[str, Any]) -> Tensor:
            cache["values"].append(self.layer(x))
            cache["count"] = len(cache["values"])
            return cache["values"][-1]

    model = Appends()
    wrapprec.wrap(model, policy=policy)
    start = torch.zeros(8)
    cache: dict[str, Any] = {"values": [start]}
    values = cache["values"]
    model(torch.randn(8), cache)
    assert cache["values"] is values and values[0] is start and len(values) == 2 and cache["count"] == 2


# Autocast


@each_policy
def test_autocast_outside_is_as_before_and_the_plan_wins_over_the_users(policy: str) -> None:
    other = BF16 if LOW[policy] == F16 else F16
    model = Probe()
    wrapprec.wrap(model, policy=policy)
    with pytest.warns(wrapprec.WrapprecWarning, match="autocast"), torch.autocast("cpu", dtype=other):
        model(torch.randn(2, 8))
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == other
    assert model.seen["computed"] == LOW[policy] and not torch.is_autocast_enabled("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", dtype=other):
            model(torch.randn(2, 8))


@pytest.mark.parametrize("policy", ["16-mixed", "bf16-mixed"])
def test_autocast_of_the_user_inside_forward_is_honoured(policy: str) -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.dtypes = nn.Linear(8, 8), []

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                self.dtypes.append(F.linear(x, self.layer.weight).dtype)
            out: Tensor = self.layer(x)
            self.dtypes.append(out.dtype)
            return out

    model = Turns()
    run(model, policy)
    assert model.dtypes == [F32, LOW[policy]]


@each_policy
def test_transformer_encoder_gives_the_same_in_training_and_on_its_fast_path(policy: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    plain = model(x).detach()
    wrapprec.wrap(model, policy=policy)
    trained = model(x)
    trained.sum().backward()
    model.eval()
    with torch.no_grad():
        fast = model(x)
    # Layer norms at the end: outputs near one; bfloat16 rounds to 2**-8 in each of a dozen places.
    assert (trained - plain).abs().max() < 0.1 and (fast - plain).abs().max() < 0.1 and fast.dtype == F32


# The callable


@each_policy
def test_signature_and_attributes_of_forward_are_the_models(policy: str) -> None:
    model = Walks()
    before = inspect.signature(model.forward)
    wrapprec.wrap(model, policy=policy)
    assert inspect.signature(model.forward) == before


def test_rule_may_mix_castings() -> None:
    child = Probe()
    model = Probe(child)
    run(model, "bf16-mixed", rules=[Rule("below.0", "bf16-module")])
    assert (model.seen["weight"], child.seen["weight"], child.seen["input"]) == (F32, BF16, BF16)


@pytest.mark.parametrize("policy", MODULE)
def test_forward_that_changes_a_lent_weight_in_place_raises_and_restores(policy: str) -> None:
    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.layer.weight.mul_(0.9)
            return x * 2

    model = Decays()
    wrapprec.wrap(model, policy=policy, loss_scale=8)
    with pytest.raises(ModelChangedError, match="modified in place") as caught:
        model(torch.randn(2, 8))
    assert '"layer" (Linear)' in str(caught.value) and 'Rule("layer", "float32")' in str(caught.value)
    assert type(model.layer.weight) is nn.Parameter


@pytest.mark.parametrize(("policy", "low"), [("16-module", "float16"), ("bf16-module", "bfloat16")])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d], ids=["batch", "instance"])
def test_norm_with_statistics_computes_low_by_a_rule(norm: Any, policy: str, low: str) -> None:
    """Statistics are buffers and stay in float32, and torch's kernels want the weights alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4, affine=True, track_running_stats=True), nn.Conv2d(4, 2, 3))
    true = copy.deepcopy(model)
    wrapprec.wrap(model, policy=policy, rules=[(norm, low)], loss_scale=16.0 if low == "float16" else None)
    inside: list[torch.dtype] = []
    model[1].register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    for training in (True, False):
        model.train(training), true.train(training)
        x = torch.randn(4, 2, 8, 8)
        got, want = model(x), true(x)
        got.square().sum().backward()
        want.square().sum().backward()
        # Three layers and their inputs, each rounded once in bfloat16 (2**-9), twice the gradients'.
        assert (got - want).norm() <= 0.02 * want.norm()
    assert set(inside) == {getattr(torch, low)}
    torch.testing.assert_close(model[1].running_mean, true[1].running_mean, rtol=0.02, atol=0.002)
    for (name, param), reference in zip(model.named_parameters(), true.parameters(), strict=True):
        if name != "0.bias":  # before a norm in training: zero, but for rounding
            assert (param.grad - reference.grad).norm() <= 0.04 * reference.grad.norm()
