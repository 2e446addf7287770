"""Which layers the plan gives fp8, and what it says of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wrapprec
from wrapprec import Plan, PolicyError, WrapprecWarning, resolve
from wrapprec.backends import cuda
from wrapprec.backends.cpu import CpuBackend
from wrapprec.backends.float8 import Float8
from wrapprec.backends.select import backend_for
from wrapprec.backends.xla import XlaBackend


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class Named(nn.Linear):
    """Another class, with torch's own forward."""


def between(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), *modules, nn.Linear(16, 16))


def decided(model: nn.Module, policy: str = "fp8-mixed", **options: Any) -> dict[str, tuple[Any, str]]:
    plan = resolve(model, policy, **options)
    return {p.name: (p.precision.compute_dtype, p.rule) for p in plan.placements}


def test_first_and_last_layer_stay_in_bfloat16() -> None:
    found = decided(between(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)))
    assert found["0"] == (torch.bfloat16, "default: first Linear")
    assert found["4"] == (torch.bfloat16, "default: last Linear")
    assert found["1"] == found["3"] == ("fp8", "policy")
    assert found[""] == ("fp8", "policy") and found["2"] == (torch.bfloat16, "policy")


def test_rules_override_the_ends_where_they_match_the_layer_itself() -> None:
    model = between(nn.Linear(16, 16))
    assert decided(model, rules=[(nn.Linear, "fp8")])["0"] == ("fp8", "rule 1: class:torch.nn.modules.linear.Linear")
    assert decided(model, rules=[("2", "fp8,recipe=rowwise")])["2"] == ("fp8", 'rule 1: "2"')
    # As with norms, what is decided for a layer is deeper than a rule for what is around it.
    assert decided(model, "bf16-mixed", rules=[("", "fp8")])["0"] == (torch.bfloat16, "default: first Linear")
    # The ends are those of the model, wherever fp8 begins.
    model = between(nn.Sequential(nn.Linear(16, 16)))
    assert decided(model, "bf16-mixed", rules=[("1", "fp8")])["1.0"] == ("fp8", 'rule 1: "1"')


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Linear(16, 10), "out_features=10 is no multiple of 16"),
        (nn.Linear(24, 16), "in_features=24 is no multiple of 16"),
        (Own(16, 16), "it has a forward of its own"),
        (nn.LazyLinear(16), "it has no sizes before its first forward"),
    ],
)
def test_a_layer_that_does_not_fit_stays_in_bfloat16_whatever_the_rules(module: nn.Module, why: str) -> None:
    model = between(module)
    assert decided(model)["1"] == (torch.bfloat16, f"policy; not fp8: {why}")
    assert decided(model, rules=[("1", "fp8")])["1"] == (torch.bfloat16, f'rule 1: "1"; not fp8: {why}')
    assert why in str(resolve(model, "fp8-mixed"))
    assert resolve(model, "fp8-mixed").placement("1").reason.endswith(f"computed in bfloat16: {why}")


def test_an_instance_with_a_forward_of_its_own_stays_in_bfloat16_and_keeps_it() -> None:
    pytest.importorskip("torchao")
    model = between(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].forward = lambda x: torch.zeros_like(x)
    assert decided(model)["1"] == (torch.bfloat16, "policy; not fp8: it has a forward of its own")
    handle = wrapprec.wrap(model, policy="fp8-mixed")
    before = handle.plan
    assert not model[1](torch.ones(1, 16)).any()
    # Wrapped, its forward is ours, and the plan is the same.
    assert resolve(model, "fp8-mixed") == before


def test_a_class_with_torchs_forward_and_computed_weights_fit() -> None:
    model = between(Named(16, 16), parametrizations.weight_norm(nn.Linear(16, 16)))
    found = decided(model)
    assert found["1"] == found["2"] == ("fp8", "policy")


def test_attention_stays_in_bfloat16() -> None:
    found = decided(between(nn.TransformerEncoderLayer(16, 2, 32)))
    assert found["1.self_attn"] == (torch.bfloat16, "policy")
    assert found["1.self_attn.out_proj"] == (torch.bfloat16, "policy; not fp8: attention uses its weight directly")
    assert found["1.linear1"] == found["1.linear2"] == ("fp8", "policy")


def test_what_is_no_linear_is_as_under_bf16_mixed() -> None:
    model = between(nn.Conv1d(16, 16, 1), nn.Embedding(4, 16), nn.LayerNorm(16), nn.LSTM(16, 16), nn.Softmax(-1))
    low, plain = resolve(model, "fp8-mixed"), resolve(model, "bf16-mixed")
    for name in ("1", "2", "3", "4", "5"):
        one, other = low.placement(name), plain.placement(name)
        assert (one.precision, one.activations, one.is_root) == (other.precision, other.activations, other.is_root)


def test_fp8_begins_no_region_of_its_own() -> None:
    plan = resolve(between(nn.Linear(16, 16)), "bf16-mixed", rules=[("1", "fp8")])
    assert [p.name for p in plan.placements if p.is_root] == [""]


def test_no_copies_of_weights_are_foreseen_for_fp8_layers() -> None:
    # fp8 is made of the weights themselves; autocast and module casting hold copies in bfloat16 for backward.
    lent = {p.name: p.weights[0].lent for p in resolve(between(nn.Linear(16, 16)), "fp8-mixed").placements if p.weights}
    assert lent == {"0": torch.bfloat16, "1": None, "2": torch.bfloat16}
    plan = resolve(between(nn.Linear(16, 16)), "fp8,casting=module")
    assert plan.placement("1").weights[0].lent is torch.bfloat16


def test_a_shared_layer_is_decided_once() -> None:
    layer = nn.Linear(16, 16)
    found = decided(nn.Sequential(layer, nn.Linear(16, 16), layer))
    assert found == {"": ("fp8", "policy"), "0": (torch.bfloat16, "default: first Linear"), "1": found["1"]}
    assert found["1"] == (torch.bfloat16, "default: last Linear")


@pytest.mark.parametrize(
    ("recipe", "sizes", "gains"),
    [
        ("tensorwise", (4096, 1024), False),
        ("tensorwise", (4096, 1040), True),
        ("tensorwise", (4112, 1024), True),
        ("rowwise", (4096, 2048), False),
        ("rowwise", (1024, 8192), False),
        ("rowwise", (2048, 4096), False),
        ("rowwise", (2064, 4096), True),
        ("rowwise_with_gw_hp", (2048, 4096), False),
        ("rowwise_with_gw_hp", (2048, 4112), True),
    ],
)
def test_too_small_layers_stay_in_bfloat16_where_there_are_kernels(
    recipe: str, sizes: tuple[int, int], gains: bool, monkeypatch: Any
) -> None:
    model = between(nn.Linear(*sizes, device="meta"))
    policy = f"fp8-mixed,recipe={recipe}"
    assert decided(model, policy, device="cpu")["1"] == ("fp8", "policy")  # Emulated, none gains.
    monkeypatch.setattr(CpuBackend, "float8", Float8(lambda device: True))
    small = torch.bfloat16, f"default: too small to gain by fp8 ({sizes[0]} x {sizes[1]})"
    assert decided(model, policy, device="cpu")["1"] == (("fp8", "policy") if gains else small)
    assert decided(model, policy, device="cpu", rules=[("1", "fp8")])["1"] == ("fp8", 'rule 1: "1"')


def test_thresholds_are_those_of_torchao() -> None:
    float8 = pytest.importorskip("torchao.float8")
    from wrapprec.fits import _is_small

    for recipe in ("tensorwise", "rowwise"):
        keeps = float8._auto_filter_for_recipe(recipe, [])
        for rows in range(1024, 5120, 512):
            for columns in range(1024, 5120, 512):
                for more in (0, 16):
                    layer = nn.Linear(columns + more, rows + more, device="meta")
                    assert _is_small(layer, recipe) is not keeps(layer, ""), (recipe, layer)


def test_a_model_without_a_layer_for_fp8_is_warned_of() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plan = resolve(model, "fp8-mixed")
    text = "fp8 was asked for, and none of 2 Linear layers computes in it: the plan says why"
    assert text in plan.notes
    with pytest.warns(WrapprecWarning, match="none of 2 Linear layers"):
        wrapprec.wrap(model, policy="fp8-mixed")
    assert not any("was asked for" in note for note in resolve(between(nn.Linear(16, 16)), "fp8-mixed").notes)
    assert not any("was asked for" in note for note in resolve(model, "bf16-mixed").notes)


def test_the_plan_says_that_fp8_is_emulated_once() -> None:
    note = next(note for note in resolve(between(nn.Linear(16, 16)), "fp8-mixed").notes if "emulated" in note)
    assert note.startswith("fp8 is emulated on this cpu, for tests: its numbers are raised to float32")
    assert "compute capability 8.9" in note


def test_devices_that_were_never_tried_compute_in_bfloat16() -> None:
    precision = wrapprec.Policy.parse("fp8-mixed,recipe=rowwise").precision
    xla = XlaBackend()
    assert xla.native(precision) == wrapprec.Policy.parse("bf16-mixed").precision
    assert xla.advise(precision, torch.device("xla")) == (
        "fp8 has not been tried on xla: bfloat16 is used in its place"
    )
    assert backend_for("cpu").native(precision) == precision


def test_devices_that_quantised_weights_were_never_tried_on_say_so() -> None:
    said = "quantised weights have not been tried on mps: they stay in float32, of which bfloat16 is made"
    model = between(nn.Linear(256, 256))
    for policy in ("nf4", "int8-training"):
        plan = resolve(model, policy, device="mps")
        assert plan.notes == (said,)
        assert {placement.precision.param_dtype for placement in plan.placements} == {torch.float32}


@pytest.mark.parametrize(
    ("version", "arch", "hip", "multiplies"),
    [
        ((8, 0), "", None, False),
        ((8, 6), "", None, False),
        ((8, 9), "", None, True),
        ((9, 0), "", None, True),
        ((12, 0), "", None, True),
        ((9, 0), "gfx90a:sramecc+", "6.4", False),
        ((9, 4), "gfx942:sramecc+", "6.4", True),
    ],
)
def test_kernels_are_there_from_ada_and_mi300_on(
    version: tuple[int, int], arch: str, hip: str | None, multiplies: bool, monkeypatch: Any
) -> None:
    device = torch.device("cuda")
    assert not cuda.CudaBackend.float8.multiplies(device) or torch.cuda.is_available()
    properties = SimpleNamespace(major=version[0], minor=version[1], gcnArchName=arch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert cuda.CudaBackend.float8.multiplies(device) is multiplies


@pytest.mark.parametrize("policy", ["fp8-mixed", "fp8-mixed,recipe=rowwise"])
def test_plans_with_fp8_serialise(policy: str) -> None:
    plan = resolve(
        between(nn.Linear(16, 16), nn.Linear(16, 10)), policy, rules=[("1", "fp8,recipe=rowwise_with_gw_hp")]
    )
    again = Plan.from_dict(plan.to_dict())
    assert again == plan and again.placement("1").precision.recipe == "rowwise_with_gw_hp"


def test_parameters_in_low_precision_under_fp8_are_refused() -> None:
    model = between(nn.Linear(16, 16))
    with pytest.raises(PolicyError, match="float32 parameters"):
        wrapprec.wrap(model, policy="p=bf16,c=fp8")
