"""What a policy's text means, and that printing and parsing are each other's inverse."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wrapprec.errors import PolicyError
from wrapprec.policy import LossScale, Policy, Precision, Rule, parse_loss_scale, rule_precision
from wrapprec.recipe import RECIPES

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

PRESETS: dict[str, tuple[Any, ...]] = {
    "32-true": (F32, F32, F32, None),
    "64-true": (F64, F64, F64, None),
    "16-mixed": (F32, F16, F32, "op"),
    "bf16-mixed": (F32, BF16, F32, "op"),
    "16-module": (F32, F16, F32, "module"),
    "bf16-module": (F32, BF16, F32, "module"),
    "16-true": (F16, F16, F16, "module"),
    "bf16-true": (BF16, BF16, BF16, "module"),
    "fp8-mixed": (F32, "fp8", F32, "op"),
    "nf4": ("nf4", BF16, F32, "op"),
    "nf4-dq": ("nf4-dq", BF16, F32, "op"),
    "fp4": ("fp4", BF16, F32, "op"),
    "fp4-dq": ("fp4-dq", BF16, F32, "op"),
    "int8": ("int8", BF16, F32, "op"),
    "int8-training": ("int8-training", BF16, F32, "op"),
    "32-fast": (F32, "tf32", F32, None),
}
SPELLINGS: dict[str, list[Any]] = {
    "32-true": [32, "32", "fp32", "float32", "full", "no", "O0", F32],
    "64-true": [64, "64", "float64", "double", F64],
    "16-mixed": [16, "16", "fp16", "O1", "o1", "mixed_float16", "amp_fp16", "16-MIXED", F16],
    "bf16-mixed": ["bf16", "mixed_bfloat16", "amp_bf16", "BF16", BF16],
    "16-module": ["O2"],
    "16-true": ["O3", "half"],
    "fp8-mixed": ["fp8", "amp_fp8"],
}


def in_decoder(name: str, module: nn.Module) -> bool:
    """A function that a rule can name."""
    return name.startswith("decoder")


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_means_what_the_table_says(preset: str) -> None:
    policy = Policy.parse(preset)
    assert (policy.param_dtype, policy.compute_dtype, policy.output_dtype, policy.casting) == PRESETS[preset]
    assert policy.cast_inputs is None
    assert policy.rules == ()
    assert policy.strict
    assert policy.loss_scale == (None if preset == "16-true" else "auto")
    assert policy.rounding == ("kahan" if preset in ("bf16-true", "16-true") else None)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_prints_as_its_name(preset: str) -> None:
    assert str(Policy.parse(preset)) == preset


@pytest.mark.parametrize(("preset", "spelling"), [(p, s) for p, many in SPELLINGS.items() for s in many])
def test_every_spelling_means_its_preset(preset: str, spelling: Any) -> None:
    assert Policy.parse(spelling) == Policy.parse(preset)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params=float32,compute=bfloat16,output=float32", "bf16-mixed"),
        ("p=f32, c=f16, o=f32", "16-mixed"),
        ("p=f16", "16-true"),
        ("p=bf16", "bf16-true"),
        ("params=float64", "64-true"),
        ("c=f32", "32-true"),
        ("p=f32,c=bf16,o=f32,casting=module", "bf16-module"),
    ],
)
def test_jmp_grammar_means_the_preset(text: str, expected: str) -> None:
    assert Policy.parse(text) == Policy.parse(expected)


def test_output_defaults_to_compute_and_compute_to_params() -> None:
    assert Policy.parse("c=bf16").output_dtype == BF16
    assert Policy.parse("p=bf16").compute_dtype == BF16


def test_policy_that_is_no_preset_prints_what_differs_from_the_defaults() -> None:
    policy = Policy(F32, BF16, BF16, "module", cast_inputs=False, loss_scale=None, rounding="stochastic", strict=False)
    assert str(policy) == (
        "params=float32,compute=bfloat16,casting=module,cast_inputs=false,"
        "loss_scale=none,rounding=stochastic,strict=false"
    )


def test_preset_may_be_overridden_and_followed_by_rules() -> None:
    policy = Policy.parse("bf16-mixed,output=bfloat16; decoder.*.norm = float32; head = p=f32,c=f16,o=f32")
    assert policy.output_dtype == BF16
    assert policy.casting == "op"
    assert policy.rules == (Rule("decoder.*.norm", F32), Rule("head", Precision(F32, F16, F32, "op")))


def test_rules_print_by_glob_class_and_function() -> None:
    rules = (Rule("decoder.*", "fp32"), Rule(nn.Linear, "bf16"), Rule(in_decoder, "16-mixed"))
    policy = Policy(F32, BF16, F32, "op", rules=rules)
    assert str(policy) == (
        "bf16-mixed; decoder.* = float32; class:torch.nn.modules.linear.Linear = bfloat16; "
        f"function:{__name__}:in_decoder = 16-mixed"
    )
    assert Policy.parse(str(policy)) == policy


def test_lambda_prints_and_does_not_parse_back() -> None:
    policy = Policy(F32, BF16, F32, "op", rules=(Rule(lambda name, module: True, F32),))
    assert str(policy) == "bf16-mixed; function:<lambda> = float32"
    with pytest.raises(PolicyError) as caught:
        Policy.parse(str(policy))
    assert str(caught.value) == (
        "Expected an importable function to select by.\n"
        "Received: function:<lambda>\n"
        "Remedy: move the function to the top level of a module, where it can be imported"
    )


def test_unknown_spelling_lists_the_accepted_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError) as caught:
        Policy.parse("bf16-mixd")
    text = str(caught.value)
    for spelling in ("32-true", "O1", "mixed_bfloat16", "nf4-dq", "32-fast", "auto"):
        assert spelling in text
    assert "Received: 'bf16-mixd'" in text
    assert text.endswith("Remedy: did you mean 'bf16-mixed'? write one of these spellings")


def test_auto_needs_a_device() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.parse("auto")
    assert str(caught.value) == (
        "Expected a policy that can be read without a device.\n"
        "Received: 'auto'\n"
        "Remedy: pass 'auto' to wrap or resolve, which know the model's device"
    )


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("compte=bf16", "did you mean 'compute'?"),
        ("p=f32,params=f16", "each policy key once, but 'params' comes twice"),
        ("p=f32,bf16", "key=value after the first comma"),
        ("p=f31", "did you mean 'f32'?"),
        ("bf16-mixed; norm", "`select = precision` after a semicolon"),
        ("bf16-mixed,casting=ops", "casting=op, module or none"),
        ("bf16-mixed,strict=maybe", "true or false for strict"),
        ("bf16-mixed,cast_inputs=1", "true or false for cast_inputs"),
        ("bf16-mixed,rounding=kahn", "did you mean 'kahan'?"),
        ("bf16-mixed,growth_factor=2", None),
        ("bf16-mixed,loss_scale=none,init_scale=2", "loss_scale=dynamic together with init_scale"),
        ("bf16-mixed,growth_interval=2.5", "a number for growth_interval"),
        ("bf16-mixed; class:torch.nn.Linea = f32", "an importable class to select by"),
        ("bf16-mixed; function:math:pi = f32", "an importable function to select by"),
        ("", "a policy, one of"),
    ],
)
def test_unreadable_text_is_refused_with_the_reason(text: str, fragment: str | None) -> None:
    if fragment is None:
        Policy.parse(text)
        return
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text)
    assert fragment in str(caught.value)
    assert "Remedy: " in str(caught.value)


@pytest.mark.parametrize("spec", [None, 1.5, True, [], 17, torch.int64])
def test_other_specs_are_refused(spec: Any) -> None:
    with pytest.raises(PolicyError):
        Policy.parse(spec)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((F32, BF16, F32, None), "a casting where computation is in another dtype"),
        ((F32, F32, F32, "op"), "a low-precision compute dtype with casting='op'"),
        (("fp8", BF16, F32, "op"), "for the parameters"),
        ((F32, "nf4", F32, "op"), "to compute in"),
        ((F32, BF16, "fp8", "op"), "a torch dtype for outputs"),
        ((F32, BF16, F32, "ops"), "casting 'op', 'module' or None"),
    ],
)
def test_dtypes_and_casting_that_do_not_go_together_are_refused(arguments: Any, fragment: str) -> None:
    for kind in (Precision, Policy):
        with pytest.raises(PolicyError) as caught:
            kind(*arguments)
        assert fragment in str(caught.value)


def test_inputs_are_cast_by_default_only_under_module_casting() -> None:
    assert not Policy.parse("bf16-mixed").precision.casts_inputs
    assert Policy.parse("bf16-module").precision.casts_inputs
    assert Policy.parse("bf16-mixed,cast_inputs=true").precision.casts_inputs
    assert not Policy.parse("bf16-module,cast_inputs=false").precision.casts_inputs


def test_policies_are_hashable_and_functions_hash_by_identity() -> None:
    rules = (Rule(in_decoder, F32),)
    same = {Policy(F32, BF16, F32, "op", rules=rules), Policy("f32", "bf16", "f32", "op", rules=list(rules))}  # type: ignore[arg-type]
    assert len(same) == 1
    assert Policy(F32, BF16, F32, "op", rules=(Rule(lambda n, m: True, F32),)) not in same


def test_policy_survives_pickling() -> None:
    policy = Policy.parse("bf16-true; class:torch.nn.modules.linear.Linear = float32")
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_defaults_of_the_loss_scale_are_those_of_gradscaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    scale = LossScale()
    assert scale.init_scale == scaler._init_scale
    assert scale.growth_factor == scaler.get_growth_factor()
    assert scale.backoff_factor == scaler.get_backoff_factor()
    assert scale.growth_interval == scaler.get_growth_interval()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", "auto"),
        (None, None),
        (False, None),
        ("none", None),
        ("dynamic", LossScale()),
        (1024, LossScale.static(1024.0)),
        (0.5, LossScale.static(0.5)),
        ("128", LossScale.static(128.0)),
        (LossScale(hysteresis=2), LossScale(hysteresis=2)),
    ],
)
def test_loss_scale_reads(value: Any, expected: Any) -> None:
    assert parse_loss_scale(value) == expected


@pytest.mark.parametrize("value", ["dinamic", True, [], 0, -1.0, float("inf"), float("nan"), "nan"])
def test_other_loss_scales_are_refused(value: Any) -> None:
    with pytest.raises(PolicyError):
        parse_loss_scale(value)


@pytest.mark.parametrize(
    "values",
    [
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0.0},
        {"growth_interval": 0},
        {"growth_interval": 1.5},
        {"min_scale": 0.0},
        {"min_scale": 2.0, "init_scale": 1.0},
        {"max_scale": 2.0},
        {"max_scale": float("inf")},
        {"hysteresis": 0},
        {"max_consecutive_skips": 0},
    ],
)
def test_loss_scale_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="Received: "):
        LossScale(**values)


@pytest.mark.parametrize(
    ("text", "dtype", "expected"),
    [
        ("bf16-mixed", "float32", Precision(F32, F32, F32)),
        ("bf16-mixed", "32", Precision(F32, F32, F32)),
        ("bf16-mixed", F64, Precision(F64, F64, F64)),
        ("bf16-mixed", "half", Precision(F32, F16, F32, "op")),
        ("bf16-module", "fp16", Precision(F32, F16, F32, "module")),
        ("bf16-true", "f16", Precision(BF16, F16, BF16, "module")),
        ("nf4", "bf16", Precision(F32, BF16, F32, "op")),
        ("32-true", "bf16", Precision(F32, BF16, F32, "op")),
        ("bf16-mixed", "32-true", Precision(F32, F32, F32)),
        ("bf16-mixed", "O2", Precision(F32, F16, F32, "module")),
        ("bf16-mixed", "c=f16", Precision(F32, F16, F16, "op")),
        ("bf16-mixed", Precision(F32, F16, BF16, "module"), Precision(F32, F16, BF16, "module")),
    ],
)
def test_rule_precision_takes_what_is_missing_from_the_policy(text: str, dtype: Any, expected: Precision) -> None:
    assert rule_precision(Policy.parse(text), Rule("x", dtype)) == expected


@pytest.mark.parametrize("precision", ["floot32", "c=bf16,loss_scale=none", "bf16-mixed; a = f32", 16, None])
def test_rule_with_an_unreadable_precision_is_refused(precision: Any) -> None:
    with pytest.raises(PolicyError):
        Rule("x", precision)


@pytest.mark.parametrize("rules", [("norm",), ((1, "f32"),), (("a", "f32", "b"),)])
def test_what_is_no_rule_is_refused(rules: Any) -> None:
    with pytest.raises(PolicyError):
        Policy(F32, BF16, F32, "op", rules=rules)


def test_toml_has_the_keys_of_the_grammar_and_a_table_a_rule(tmp_path: Path) -> None:
    policy = Policy.parse("bf16-mixed,output=bf16,init_scale=8; *.norm = float32; head = bf16-module")
    text = policy.to_toml()
    assert text == (
        'params = "float32"\ncompute = "bfloat16"\nloss_scale = "dynamic"\ninit_scale = "8.0"\n'
        '\n[[rules]]\nselect = "*.norm"\nprecision = "float32"\n'
        '\n[[rules]]\nselect = "head"\nprecision = "bf16-module"\n'
    )
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    assert Policy.from_toml(text) == Policy.from_toml(path) == Policy.from_toml(str(path)) == policy


def test_toml_takes_numbers_and_flags_as_such() -> None:
    text = 'preset = "O1"\ninit_scale = 8\ngrowth_interval = 100\nstrict = false\n'
    expected = LossScale(init_scale=8.0, growth_interval=100)
    assert Policy.from_toml(text).loss_scale == expected
    assert not Policy.from_toml(text).strict


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('comput = "bf16"', "did you mean 'compute'?"),
        ('preset = "bf16-mixed"\n[[rules]]\nselect = "x"\n', "select and precision in each [[rules]] table"),
        ("x = ", "a policy in TOML"),
        ('[[rules]]\nselect = "x"\nprecision = "f32"\n', "nothing but rules"),
        ("preset = 16", None),
    ],
)
def test_unreadable_toml_is_refused_with_the_reason(text: str, fragment: str | None) -> None:
    if fragment is None:
        assert Policy.from_toml(text) == Policy.parse(16)
        return
    with pytest.raises(PolicyError) as caught:
        Policy.from_toml(text)
    assert fragment in str(caught.value)


LOW = st.sampled_from([F16, BF16])
PRECISIONS = st.one_of(
    st.sampled_from([Precision(*PRESETS[name]) for name in PRESETS]),
    st.builds(
        Precision,
        st.sampled_from([F32, F16, BF16, "nf4", "int8"]),
        st.sampled_from([F16, BF16, "fp8"]),
        st.sampled_from([F32, F16, BF16, F64]),
        st.sampled_from(["op", "module"]),
        st.sampled_from([None, True, False]),
    ),
    st.builds(Precision, st.just(F32), st.just("fp8"), st.just(F32), st.just("op"), recipe=st.sampled_from(RECIPES)),
)
SELECTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["class:x", "function:y", "", " a ", 'q"; = "', "decoder.*.norm", "[!a]?"]),
    st.sampled_from([nn.Linear, nn.LayerNorm, in_decoder]),
)
RULES = st.builds(Rule, SELECTS, st.one_of(PRECISIONS, st.sampled_from([F32, F16, BF16, F64])))
FACTORS = st.floats(min_value=1.0, max_value=1e6, exclude_min=True)
SCALES = st.one_of(
    st.sampled_from([None, "auto", LossScale()]),
    st.floats(min_value=1e-30, max_value=1e30).map(LossScale.static),
    st.builds(
        LossScale,
        init_scale=st.floats(min_value=1.0, max_value=1e30),
        growth_factor=FACTORS,
        backoff_factor=st.floats(min_value=0.01, max_value=0.99),
        growth_interval=st.integers(1, 10**6),
        hysteresis=st.integers(1, 5),
        max_consecutive_skips=st.integers(1, 1000),
        dynamic=st.booleans(),
    ),
)
POLICIES = st.builds(
    lambda p, rules, scale, rounding, strict: Policy(
        **vars(p), rules=rules, loss_scale=scale, rounding=rounding, strict=strict
    ),
    PRECISIONS,
    st.lists(RULES, max_size=3).map(tuple),
    SCALES,
    st.sampled_from([None, "kahan", "stochastic", "nearest"]),
    st.booleans(),
)


@given(POLICIES)
def test_any_policy_parses_back_from_its_text(policy: Policy) -> None:
    assert Policy.parse(str(policy)) == policy


@given(POLICIES)
def test_any_policy_reads_back_from_its_toml(policy: Policy) -> None:
    assert Policy.from_toml(policy.to_toml()) == policy


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_print_and_parse_back(recipe: str) -> None:
    policy = Policy.parse(f"fp8-mixed,recipe={recipe.upper()}; head = fp8-mixed,recipe=rowwise")
    assert policy.recipe == policy.precision.recipe == recipe
    assert Policy.parse(str(policy)) == policy == Policy.from_toml(policy.to_toml())
    assert policy.rules[0].precision.recipe == "rowwise"
    assert (Policy.parse("fp8") == Policy.parse(f"fp8,recipe={recipe}")) is (recipe == "tensorwise")
    assert eval(repr(policy.precision), {"Precision": Precision}) == policy.precision


def test_a_recipe_without_fp8_and_an_unknown_one_are_refused() -> None:
    with pytest.raises(PolicyError) as error:
        Policy.parse("bf16-mixed,recipe=rowwise")
    assert str(error.value) == (
        "Expected a recipe where the compute dtype is fp8 only.\n"
        "Received: recipe=rowwise, compute=bfloat16\n"
        "Remedy: leave the recipe out, or compute in fp8"
    )
    with pytest.raises(PolicyError) as error:
        Policy.parse("fp8,recipe=rowise")
    assert str(error.value) == (
        "Expected an fp8 recipe, one of tensorwise, rowwise, rowwise_with_gw_hp.\n"
        "Received: 'rowise'\n"
        "Remedy: did you mean 'rowwise'? write one of these"
    )
