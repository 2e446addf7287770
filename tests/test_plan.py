"""Which rule decides for which module, against a reference in plain words."""

from __future__ import annotations

import copy
import fnmatch
import json
import time
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wrapprec
from wrapprec.backends import cpu
from wrapprec.backends.cpu import CpuBackend
from wrapprec.errors import PolicyError, WrapprecWarning
from wrapprec.placement import Placement, Plan
from wrapprec.plan import resolve
from wrapprec.policy import LossScale, Policy, Precision, Rule

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
ISLAND = Precision(F32, F32, F32)
MIXED = Precision(F32, BF16, F32, "op")


class OwnNorm(nn.Module):
    """A hand-written norm, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Router(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.zeros(4).index_add_(0, index, x)


def block() -> nn.Module:
    module = nn.Module()
    module.fc = nn.Linear(4, 4)
    module.norm = nn.LayerNorm(4)
    return module


def model() -> nn.Module:
    module = nn.Module()
    module.encoder = block()
    module.decoder = block()
    module.own = OwnNorm()
    module.soft = nn.Softmax(-1)
    return module


def rules_of(plan: Plan) -> dict[str, str]:
    return {placement.name: placement.rule for placement in plan.placements}


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx512_bf16"}))


def test_defaults_keep_norms_and_softmax_in_float32() -> None:
    plan = resolve(model(), "bf16-mixed")
    assert {p.name: p.precision for p in plan.placements} == {
        "": MIXED,
        "encoder": MIXED,
        "encoder.fc": MIXED,
        "encoder.norm": ISLAND,
        "decoder": MIXED,
        "decoder.fc": MIXED,
        "decoder.norm": ISLAND,
        "own": ISLAND,
        "soft": ISLAND,
    }
    assert [p.name for p in plan.placements if p.rule == "default: normalisation"] == [
        "encoder.norm",
        "decoder.norm",
        "own",
    ]
    assert plan.placement("soft").rule == "default: softmax"
    assert plan.placement("encoder.fc").rule == "policy"


def test_torch_norm_keeps_activations_and_begins_no_region() -> None:
    placement = resolve(model(), "bf16-module").placement("encoder.norm")
    assert (placement.activations, placement.is_root) == ("keep", False)
    assert placement.reason == (
        "parameters, statistics and accumulation in float32; activations stay bfloat16: kernel probed"
    )


def test_hand_written_norm_restores_activations_and_begins_a_region() -> None:
    placement = resolve(model(), "bf16-module").placement("own")
    assert (placement.activations, placement.is_root) == ("restore", True)
    assert placement.reason == "activations go to float32 and back to bfloat16: not one of torch's own classes"


def test_torch_norm_whose_kernel_refuses_the_mix_restores_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "accepts_mixed_norm", lambda *arguments: False)
    placement = resolve(model(), "bf16-mixed").placement("encoder.norm")
    assert (placement.activations, placement.is_root) == ("restore", True)
    assert placement.reason.endswith("its kernel does not take the mix")


def test_norm_matched_by_a_rule_of_the_user_is_a_full_island() -> None:
    placement = resolve(model(), "bf16-mixed", rules=[("*.norm", "float32")]).placement("encoder.norm")
    assert (placement.activations, placement.is_root, placement.precision) == ("cast", True, ISLAND)
    assert placement.rule == 'rule 1: "*.norm"'


def test_rule_on_a_parent_leaves_the_default_norm_below_it() -> None:
    plan = resolve(model(), "32-true", rules=[("decoder", "bf16")])
    assert plan.placement("decoder.fc").rule == 'rule 1: "decoder"'
    assert plan.placement("decoder.norm").rule == "default: normalisation"
    assert plan.placement("encoder.norm").rule == "policy"


def test_rule_with_a_star_reaches_the_norm_itself() -> None:
    plan = resolve(model(), "bf16-mixed", rules=[("decoder*", "f16")])
    assert plan.placement("decoder.norm").rule == 'rule 1: "decoder*"'
    assert plan.placement("decoder.norm").precision.compute_dtype == F16


def test_last_of_the_rules_that_match_the_same_module_wins() -> None:
    rules = [("decoder.fc", "f32"), (nn.Linear, "f16"), (lambda name, module: name == "encoder.fc", "f32")]
    plan = resolve(model(), "bf16-mixed", rules=rules)
    assert plan.placement("decoder.fc").rule == "rule 2: class:torch.nn.modules.linear.Linear"
    assert plan.placement("encoder.fc").rule == "rule 3: function:<lambda>"


def test_rules_given_to_resolve_come_after_those_of_the_policy() -> None:
    policy = Policy.parse("bf16-mixed; decoder = f16")
    plan = resolve(model(), policy, rules=[("decoder", "f32")])
    assert plan.placement("decoder.fc").rule == 'rule 2: "decoder"'
    assert [rule.select for rule in plan.policy.rules] == ["decoder", "decoder"]
    assert policy.rules == (Rule("decoder", "f16"),)


def test_root_is_matched_by_the_empty_name() -> None:
    plan = resolve(model(), "bf16-mixed", rules=[("", "f32")])
    assert set(rules_of(plan).values()) == {'rule 1: ""'}
    assert [p.name for p in plan.placements if p.is_root] == [""]


def test_norm_inside_a_float64_island_stays_float64() -> None:
    plan = resolve(model(), "bf16-mixed", rules=[("decoder", "float64")])
    assert plan.placement("decoder.norm").precision == Precision(F64, F64, F64)


@pytest.mark.parametrize("policy", [32, 64, "32-fast"])
def test_without_low_precision_the_defaults_do_not_apply(policy: Any) -> None:
    assert set(rules_of(resolve(model(), policy)).values()) == {"policy"}


def test_roots_are_where_the_precision_changes() -> None:
    plan = resolve(model(), "bf16-mixed", rules=[("decoder", "f32"), ("decoder.fc", "bf16")])
    assert [p.name for p in plan.placements if p.is_root] == ["", "decoder", "decoder.fc", "own", "soft"]


def test_rule_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(PolicyError) as caught:
        resolve(model(), "bf16-mixed", rules=[("decodr.fc", "f32")])
    assert str(caught.value) == (
        "Expected every rule to match a module.\n"
        'Received: rule 1: "decodr.fc", which matches none of 9\n'
        "Remedy: did you mean 'decoder.fc'? correct the rule, drop it, or set strict=False on the policy"
    )


def test_rule_that_matches_nothing_is_a_warning_when_not_strict() -> None:
    with pytest.warns(WrapprecWarning, match="decodr"):
        resolve(model(), "bf16-mixed,strict=false", rules=[("decodr.fc", "f32")])


def test_shared_module_has_one_placement_under_its_first_name() -> None:
    tied = nn.Module()
    tied.first = nn.Linear(2, 2)
    tied.second = tied.first
    plan = resolve(tied, "bf16-mixed", rules=[("*", "f32")])
    assert [p.name for p in plan.placements] == ["", "first"]


def test_shared_module_matched_under_one_name_only_is_ambiguous() -> None:
    tied = nn.Module()
    tied.first = nn.Linear(2, 2)
    tied.second = tied.first
    with pytest.raises(PolicyError) as caught:
        resolve(tied, "bf16-mixed", rules=[("second", "f32")])
    text = str(caught.value)
    assert text.startswith("Expected one precision for a module that has two names.")
    assert 'as "first" (policy)' in text
    assert 'as "second" (rule 1: "second")' in text
    assert 'Where: "first" (Linear)' in text
    assert text.endswith('Remedy: add a rule for both names: "first" and "second"')


def test_module_that_contains_itself_is_walked_once() -> None:
    loop = nn.Sequential(nn.Linear(2, 2))
    loop.append(loop)
    assert [p.name for p in resolve(loop, "bf16-mixed").placements] == ["", "0"]


def test_hugging_face_names_are_kept_wherever_they_stand_below_the_model() -> None:
    outer, inner = nn.Module(), model()
    inner._keep_in_fp32_modules = ["decoder"]  # type: ignore[assignment]  # as transformers has it
    outer.inner, outer.decoder = inner, nn.Linear(2, 2)
    plan = resolve(outer, "16-mixed")
    assert plan.placement("inner.decoder.fc").rule == "default: kept by the Hugging Face model"
    assert plan.placement("decoder").rule == "policy"
    plan = resolve(outer, "16-mixed", rules=[("inner.decoder.fc", "f16")])
    assert plan.placement("inner.decoder.fc").precision.compute_dtype == F16


class CastsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.saw = x.dtype
        return (x.float() * self.weight).to(x.dtype)


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_strictly_listed_code_casts_by_itself_under_module_casting(attribute: str) -> None:
    outer = nn.Sequential(nn.Linear(2, 2), CastsItself(), nn.Linear(2, 2))
    setattr(outer, attribute, ["1", "2"])
    given = attribute.endswith("strict")
    plan = resolve(outer, "bf16-module")
    assert plan.placement("1").activations == ("given" if given else "cast")
    assert plan.placement("2").activations == "cast", "torch's own code does not cast"
    assert resolve(outer, "bf16-mixed").placement("1").activations == "cast"
    wrapprec.wrap(outer, policy="bf16-module")
    assert outer(torch.ones(1, 2)).dtype == torch.float32
    assert outer[1].saw == (torch.bfloat16 if given else torch.float32)


@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed", "bf16-module", "16-module"])
def test_fourier_transform_runs_in_float32_and_gives_back_what_is_around(policy: str) -> None:
    class Fourier(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.float32
            return torch.fft.fft(x).real

    model = nn.Sequential(nn.Linear(4, 4), Fourier(), nn.Linear(4, 1))
    x = torch.randn(3, 4)
    true = model(x)
    placement = resolve(model, policy).placement("1")
    assert (placement.rule, placement.activations) == ("default: fourier", "restore")
    wrapprec.wrap(model, policy=policy)
    # Three roundings to eight bits, of terms that partly cancel.
    assert torch.allclose(model(x), true, atol=0.05)


def test_real_t5_keeps_its_output_projection_in_float32() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_decoder_layers=1, num_heads=2
    )
    plan = resolve(transformers.T5ForConditionalGeneration(config), "16-mixed")
    kept = [p.name for p in plan.placements if p.rule == "default: kept by the Hugging Face model"]
    assert kept == [
        "encoder.block.0.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.2.DenseReluDense.wo",
    ]


def test_scale_is_dynamic_if_and_only_if_something_computes_in_float16() -> None:
    assert resolve(model(), "bf16-mixed").loss_scale is None
    assert resolve(model(), "16-mixed").loss_scale == LossScale()
    assert resolve(model(), "bf16-mixed", rules=[("decoder", "f16")]).loss_scale == LossScale()
    assert resolve(model(), "16-mixed", rules=[("*", "f32")]).loss_scale is None
    assert resolve(model(), "16-true").loss_scale is None


def test_scale_given_wins_over_the_policy() -> None:
    assert resolve(model(), "16-mixed", loss_scale=None).loss_scale is None
    assert resolve(model(), "16-mixed,loss_scale=8").loss_scale == LossScale.static(8)
    assert resolve(model(), "16-mixed,loss_scale=8", loss_scale="dynamic").loss_scale == LossScale()
    assert resolve(model(), "bf16-mixed", loss_scale=4).loss_scale == LossScale.static(4)


def test_backend_that_does_not_scale_gets_no_scale_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "scaling", False)
    assert resolve(model(), "16-mixed").loss_scale is None


def test_float16_outputs_under_a_scale_are_refused() -> None:
    with pytest.raises(PolicyError) as caught:
        resolve(model(), "16-mixed,output=float16")
    assert str(caught.value) == (
        "Expected float32 or bfloat16 outputs under a loss scale.\n"
        "Received: output=float16, in which scaled gradients underflow before they are unscaled\n"
        'Where: "" (Module), by policy\n'
        "Remedy: use output=float32, or loss_scale=none"
    )
    assert resolve(model(), "16-mixed,output=float16", loss_scale=None).loss_scale is None


def test_auto_says_why() -> None:
    plan = resolve(model())
    assert plan.policy == Policy.parse("bf16-mixed")
    assert plan.reason == "this CPU computes in bfloat16 (avx512_bf16)"
    assert str(plan).splitlines()[0] == "policy      bf16-mixed  (auto: this CPU computes in bfloat16 (avx512_bf16))"


def test_float16_on_this_cpu_is_noted_once() -> None:
    (note,) = resolve(model(), "16-mixed").notes
    assert "bf16-mixed is the better choice" in note


def test_scattering_module_is_noted_and_stays_low() -> None:
    (placement,) = resolve(Router(), "bf16-mixed").placements
    assert placement.precision == MIXED
    assert placement.notes == ("its forward calls index_add_: if sums lose small terms, add a float32 rule for it",)


def test_meta_model_is_refused_unless_a_device_is_given() -> None:
    meta = model().to("meta")
    with pytest.raises(PolicyError, match="Remedy: materialise it first"):
        resolve(meta, "bf16-mixed")
    assert resolve(meta, "bf16-mixed", device="cpu").device == "cpu"


def test_model_partly_on_meta_takes_the_device_of_the_rest() -> None:
    mixed = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert resolve(mixed, "bf16-mixed").device == "cpu"


def test_resolve_touches_nothing() -> None:
    original = model()
    state = {name: dict(vars(module)) for name, module in original.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    random = torch.get_rng_state()
    first = resolve(original, "bf16-module")
    assert {name: dict(vars(module)) for name, module in original.named_modules()} == state
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in original.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert resolve(copy.deepcopy(original), "bf16-module") == first


def test_own_parameters_are_counted_and_uninitialised_ones_are_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules say that they may change
        plan = resolve(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)), "bf16-mixed")
    assert [p.params for p in plan.placements] == [0, 20, 0]


def test_table_shows_every_module_and_what_decided() -> None:
    assert str(resolve(block(), "bf16-mixed", rules=[("fc", "f32")])) == "\n".join(
        [
            "policy      bf16-mixed; fc = float32",
            "device      cpu",
            "loss scale  none",
            "",
            "module   class      params  param    compute   output   decided by",
            "-------  ---------  ------  -------  --------  -------  "
            + "-" * len("default: normalisation; activations kept"),
            "(model)  Module          0  float32  bfloat16  float32  policy",
            'fc       Linear         20  float32  float32   float32  rule 1: "fc"',
            "norm     LayerNorm       8  float32  float32   float32  default: normalisation; activations kept",
        ]
    )


def test_header_shows_the_loss_scale() -> None:
    assert "loss scale  dynamic (init_scale=65536)" in str(resolve(model(), "16-mixed"))
    assert "loss scale  8.0" in str(resolve(model(), "16-mixed", loss_scale=8))


def test_plan_goes_through_json_and_compares_equal() -> None:
    plan = resolve(
        model(), "16-mixed,cast_inputs=true; decoder.* = bf16-module; class:torch.nn.modules.linear.Linear = f32"
    )
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.to_dict()["placements"][0]["precision"] == {
        "params": "float32",
        "compute": "float16",
        "output": "float32",
        "cast_inputs": "true",
    }


def test_unknown_placement_is_refused_with_the_nearest() -> None:
    with pytest.raises(PolicyError, match=r"did you mean 'encoder\.fc'\?"):
        resolve(model(), "bf16-mixed").placement("encoder.fcc")


def test_five_thousand_modules_are_resolved_well_under_a_second() -> None:
    big = nn.ModuleList(
        [nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1), nn.Sequential(nn.ReLU())) for _ in range(1000)]
    )
    resolve(block(), "16-mixed")  # probes the norms
    begin = time.process_time()
    plan = resolve(big, "16-mixed", rules=[("*.2", "f32"), ("9*.0", "bf16"), (nn.ReLU, "f32")])
    assert len(plan.placements) == 5001
    assert time.process_time() - begin < 1.0


NAMES = st.sampled_from(["a", "b", "norm"])
TREES: st.SearchStrategy[nn.Module] = st.recursive(
    st.sampled_from([nn.Linear, nn.LayerNorm, nn.ReLU]).map(
        lambda kind: kind(1) if kind is nn.LayerNorm else kind(1, 1) if kind is nn.Linear else kind()
    ),
    lambda children: st.dictionaries(NAMES, children, max_size=3).map(nn.ModuleDict),
    max_leaves=10,
)
GLOBS = st.sampled_from(["", "a", "b", "norm", "a*", "*.norm", "a.b", "b.*", "*", "?.a", "[ab]"])
RULES = st.lists(
    st.tuples(st.one_of(GLOBS, st.just(nn.Linear)), st.sampled_from(["f32", "f16", "bf16", "f64"])), max_size=4
)


def reference(root: nn.Module, rules: list[tuple[Any, str]], name: str) -> tuple[str, str]:
    """The deepest matched ancestor or self decides, on it the last rule, and the defaults come first."""
    decided, parts = ("policy", "bf16"), name.split(".") if name else []
    for depth in range(len(parts) + 1):
        here = ".".join(parts[:depth])
        module = root.get_submodule(here)
        if isinstance(module, nn.LayerNorm) and decided[1] in ("bf16", "f16"):
            decided = ("default", "f32")
        for number, (select, precision) in enumerate(rules, 1):
            if isinstance(module, select) if isinstance(select, type) else fnmatch.fnmatchcase(here, select):
                decided = (f"rule {number}", precision)
    return decided


@settings(deadline=None)
@given(TREES, RULES)
def test_any_rules_on_any_tree_decide_as_the_reference_says(tree: nn.Module, rules: list[tuple[Any, str]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WrapprecWarning)  # random rules may match nothing
        plan = resolve(tree, "bf16-mixed,strict=false,loss_scale=none", rules=rules)
    compute = {F32: "f32", F16: "f16", BF16: "bf16", F64: "f64"}
    got = {p.name: (p.rule.split(":")[0], compute[p.precision.compute_dtype]) for p in plan.placements}  # type: ignore[index]
    assert got == {name: reference(tree, rules, name) for name, _ in tree.named_modules()}


def test_placement_is_plain_data() -> None:
    placement = Placement("fc", "Linear", ISLAND, "policy", "policy 32-true", False)
    assert placement == copy.deepcopy(placement)
    assert hash(placement) == hash(copy.deepcopy(placement))
