"""Attention gives float32's results and gradients: torch's own, its fast path, every mask, and what others wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wrapprec
from wrapprec import DtypeMismatchError, Rule
from wrapprec.cast import narrow

pytestmark = [
    pytest.mark.filterwarnings("ignore:float16 on a CPU"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    # Dynamo makes an instance of a Function to trace its context.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
MODULE = [policy for policy in POLICIES if policy.endswith("module")]
# Sixteen units in the last place, in norm: two layers round activations, weights and gradients some eight times each,
# and softmax amplifies what is rounded in its argument. A mask that is lost, or scale that stays, is off by far more.
TOLERANCE = {"16": 16 * 2**-10, "bf": 16 * 2**-7}
LOWEST = torch.finfo(torch.float32).min

each_policy = pytest.mark.parametrize("policy", POLICIES)

CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False, False, False, True], [False, False, True, True]])


def filled(mask: Tensor, value: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, value)


def assert_close(got: list[Tensor], want: list[Tensor], policy: str) -> None:
    """Norms of differences, against the tensor's own or a hundredth of the largest.

    Some gradients, such as that of a key's bias, are zero but for float32's rounding.
    """
    assert len(got) == len(want) and want
    floor = 0.01 * max(float(true.norm()) for true in want)
    for number, (mine, true) in enumerate(zip(got, want, strict=True)):
        assert mine.dtype == true.dtype == torch.float32 and mine.shape == true.shape
        off = float((mine - true).norm()) / max(float(true.norm()), floor)
        assert off <= TOLERANCE[policy[:2]], f"tensor {number} of shape {tuple(true.shape)}: off by {off:.2e}"


def train(model: Any, call: Callable[[Any, Tensor], Any]) -> list[Tensor]:
    """Outputs, and the gradients of the input and the parameters under a loss that weighs every output."""
    x = torch.randn(2, 4, 8, requires_grad=True)
    out = call(model, x)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    torch.stack([(o * torch.linspace(0.5, 1.5, o.numel()).view_as(o)).mean() for o in outs]).sum().backward()
    assert x.grad is not None
    return [*(o.detach() for o in outs), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def compare(make: Callable[[], nn.Module], call: Callable[[Any, Tensor], Any], policy: str) -> nn.Module:
    torch.manual_seed(0)
    plain = make()
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy)
    torch.manual_seed(1)
    want = train(plain, call)
    assert all(t.isfinite().all() for t in want), "the reference is no reference"
    torch.manual_seed(1)
    assert_close(train(mine, call), want, policy)
    return mine


# torch's own attention


@each_policy
@pytest.mark.parametrize("weights", ["averaged", "each", "none"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extra", [False, True])
def test_multihead_attention_is_true(policy: str, weights: str, batch_first: bool, extra: bool) -> None:
    def call(model: Any, x: Tensor) -> Any:
        return model(x, x, x, need_weights=weights != "none", average_attn_weights=weights == "averaged")

    compare(
        lambda: nn.MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=extra, add_zero_attn=extra),
        call,
        policy,
    )


@each_policy
def test_cross_attention_with_keys_and_values_of_other_widths_is_true(policy: str) -> None:
    compare(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True),
        lambda model, x: model(x, x[:, 1:, :6], x[:, 1:, :5]),
        policy,
    )


MASKS: dict[str, dict[str, Tensor]] = {
    "bool": {"attn_mask": CAUSAL},
    "bool padding": {"key_padding_mask": PADDED},
    "both bool": {"attn_mask": CAUSAL, "key_padding_mask": PADDED},
    "-inf": {"attn_mask": filled(CAUSAL, -torch.inf)},
    "finfo.min": {"attn_mask": filled(CAUSAL, LOWEST)},
    "-1e9": {"attn_mask": filled(CAUSAL, -1e9)},
    "-1e4": {"attn_mask": filled(CAUSAL, -1e4)},
    "padding of finfo.min": {"key_padding_mask": filled(PADDED, LOWEST)},
    "padding of -1e10": {"key_padding_mask": filled(PADDED, -1e10)},
    "both float": {"attn_mask": filled(CAUSAL, LOWEST), "key_padding_mask": filled(PADDED, LOWEST)},
    "bool and float": {"attn_mask": CAUSAL, "key_padding_mask": filled(PADDED, LOWEST)},
    "bias": {"attn_mask": torch.linspace(-2, 2, 16).view(4, 4)},
}


@each_policy
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_masks_the_same(policy: str, need_weights: bool, kind: str) -> None:
    before = {name: mask.clone() for name, mask in MASKS[kind].items()}
    compare(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda model, x: model(x, x, x, need_weights=need_weights, **MASKS[kind]),
        policy,
    )
    assert all(torch.equal(before[name], mask) for name, mask in MASKS[kind].items()), "the user's mask was changed"


@each_policy
@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_row_that_masks_everything_with_a_finite_number_stays_finite(
    policy: str, by_position: bool, need_weights: bool
) -> None:
    # Cast to low precision, finfo(float32).min is -inf, and a row of nothing else gives nan under torch.autocast.
    mask = filled(CAUSAL, LOWEST)
    mask[0] = LOWEST

    def call(model: Any, x: Tensor) -> Any:
        if by_position:
            return model(x, x, x, None, need_weights, mask)
        return model(x, x, x, attn_mask=mask, need_weights=need_weights)

    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    plain = copy.deepcopy(model)
    wrapprec.wrap(model, policy=policy)
    torch.manual_seed(1)
    want = train(plain, call)
    torch.manual_seed(1)
    got = train(model, call)
    assert all(t.isfinite().all() for t in got)
    if policy.startswith("bf") or need_weights:
        assert_close(got, want, policy)
    else:
        # No float16 number is so low that the scores beside it vanish in the kernel's float32: such a row weighs by
        # scores, where float32 weighs evenly. The other rows are float32's.
        assert_close([got[0][:, 1:]], [want[0][:, 1:]], policy)


def test_numbers_that_a_mask_may_hold_are_left_alone() -> None:
    mask = torch.tensor([0.0, 1e30, -1.0, -1e4, -torch.inf])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(narrow(mask, dtype), mask)
        assert narrow(torch.tensor([LOWEST]), dtype).to(dtype).isfinite().all()
        twice = narrow(torch.tensor([LOWEST]), dtype) * 2
        assert twice.to(dtype).isfinite().all(), "a mask and a padding mask are added"
    learned = torch.full((2,), -1e9, requires_grad=True)
    assert narrow(learned, torch.float16) is learned


@pytest.mark.parametrize("policy", MODULE)
def test_only_fills_are_kept_finite_in_a_cast_not_data(policy: str) -> None:
    model = nn.Sequential(nn.Identity())
    wrapprec.wrap(model, policy=policy)
    out = model(torch.tensor([LOWEST, -torch.inf, torch.inf, 7e4, -7e4, 3.0]))
    assert out[0].isfinite() and out[0] < -3e4
    low = torch.bfloat16 if policy.startswith("bf") else torch.float16
    want = torch.tensor([-torch.inf, torch.inf, 7e4, -7e4, 3.0]).to(low).float()
    assert torch.equal(out[1:], want), "an overflow of data must be seen"


@each_policy
@pytest.mark.parametrize("compiled", [False, True])
def test_mask_that_passes_through_other_modules_stays_finite_compiled_or_not(policy: str, compiled: bool) -> None:
    mask = filled(CAUSAL, LOWEST)
    mask[0] = LOWEST

    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            # Its literal makes this module's own code float32 under float16.
            self.least = torch.tensor(0.0)

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            x = self.first(x) + self.least.masked_fill(x[0, 0, 0] > 1e9, -1e9)
            return self.attention(x, x, x, attn_mask=mask + 0.0)[0]

    torch.manual_seed(0)
    model = Passes()
    plain = copy.deepcopy(model)
    wrapprec.wrap(model, policy=policy)
    run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    torch.manual_seed(1)
    want = train(plain, lambda model, x: model(x, mask))
    torch.manual_seed(1)
    assert_close(train(run, lambda model, x: model(x, mask)), want, policy)


# Transformers


@each_policy
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo.min", "none"])
def test_transformer_trains_with_masks_and_padding(policy: str, norm_first: bool, kind: str) -> None:
    values = {"-inf": -torch.inf, "finfo.min": LOWEST}
    mask = None if kind == "none" else CAUSAL if kind == "bool" else filled(CAUSAL, values[kind])
    # Mixed kinds are deprecated in torch: the padding is of the mask's kind.
    padding = PADDED if kind in ("bool", "none") else filled(PADDED, values[kind])

    def call(model: Any, x: Tensor) -> Any:
        return model(x, x.flip(1), tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding)

    compare(lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True, norm_first=norm_first), call, policy)


@each_policy
@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_alone_and_causal_hint_are_true(policy: str, norm_first: bool) -> None:
    def make() -> nn.Module:
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        return nn.TransformerDecoder(layer, 2)

    mask = nn.Transformer.generate_square_subsequent_mask(4)
    compare(make, lambda model, x: model(x, x.flip(0), tgt_mask=mask, tgt_is_causal=True), policy)


class Fast:
    """How often torch's fused kernels of eval were called."""

    def __init__(self) -> None:
        self.layers = 0
        self.attentions = 0


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fast]:
    count = Fast()
    layer, attention = torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention

    def counted_layer(*args: Any, **kwargs: Any) -> Any:
        count.layers += 1
        return layer(*args, **kwargs)

    def counted_attention(*args: Any, **kwargs: Any) -> Any:
        count.attentions += 1
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted_layer)
    monkeypatch.setattr(torch, "_native_multi_head_attention", counted_attention)
    yield count


ENCODER_MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "bool": {"mask": CAUSAL},
    "-inf": {"mask": filled(CAUSAL, -torch.inf)},
    "finfo.min": {"mask": filled(CAUSAL, LOWEST)},
    "padding": {"src_key_padding_mask": PADDED},
    "padding of finfo.min": {"src_key_padding_mask": filled(PADDED, LOWEST)},
    "both": {"mask": CAUSAL, "src_key_padding_mask": PADDED},
}


@each_policy
@pytest.mark.parametrize("kind", ENCODER_MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("how", ["no_grad", "inference", "frozen"])
def test_encoder_keeps_its_fast_path_in_eval(policy: str, kind: str, norm_first: bool, how: str, fast: Fast) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8)).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms whose weights are not one
    mine = copy.deepcopy(plain)
    handle = wrapprec.wrap(mine, policy=policy)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        want = plain(x, **ENCODER_MASKS[kind])
    assert fast.layers == 2, "the reference took another path"
    modes: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "frozen": handle.frozen,
    }
    with torch.no_grad(), modes.get(how, torch.no_grad)():
        got = mine(x, **ENCODER_MASKS[kind])
    assert fast.layers == 4
    # With padding, nested tensors leave exact zeros, before the last norm, where nothing was.
    assert_close([got.clone()], [want], policy)
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in mine.parameters())
    mine.train()
    plain.train()
    torch.manual_seed(2)
    true = train(plain, lambda model, x: model(x, **ENCODER_MASKS[kind]))
    torch.manual_seed(2)
    assert_close(train(mine, lambda model, x: model(x, **ENCODER_MASKS[kind])), true, policy)


@each_policy
@pytest.mark.parametrize("kind", ["none", "bool", "bool padding"])
def test_attention_keeps_its_fast_path_in_eval(policy: str, kind: str, fast: Fast) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy)
    x, masks = torch.randn(2, 4, 8), MASKS.get(kind, {})
    with torch.no_grad():
        want, weights = plain(x, x, x, **masks)
        assert fast.attentions == 1, "the reference took another path"
        got, mine_weights = mine(x, x, x, **masks)
    assert fast.attentions == 2
    assert_close([got, mine_weights], [want, weights], policy)


@each_policy
def test_nested_tensors_that_the_user_gives_are_encoded(policy: str, fast: Fast) -> None:
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    mine = nn.Sequential(copy.deepcopy(plain))
    wrapprec.wrap(mine, policy=policy)
    nested = torch.nested.nested_tensor([torch.randn(4, 8), torch.randn(2, 8)])
    with torch.no_grad():
        want = plain(nested).to_padded_tensor(0.0)
        got = mine(nested)
    assert fast.layers == 2 and got.is_nested
    assert_close([got.to_padded_tensor(0.0)], [want], policy)


def test_error_inside_a_nested_layer_gives_the_weights_back() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    model = nn.Sequential(layer)
    wrapprec.wrap(model, policy="bf16-module")
    wrong = torch.nested.nested_tensor([torch.randn(4, 6), torch.randn(2, 6)])
    with torch.no_grad(), pytest.raises((RuntimeError, AssertionError, IndexError)):
        model(wrong)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(type(module._parameters) is dict for module in model.modules())


# F.scaled_dot_product_attention


class Sdpa(nn.Module):
    """Projections around the function, as everybody writes them; `mask` may be given or made inside."""

    def __init__(self, made: Callable[[Tensor], Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        self.queries, self.keys, self.values = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.made, self.options = made, options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.queries, self.keys, self.values))
        if self.options.get("enable_gqa"):
            k, v = k[:, :1], v[:, :1]
        if self.made is not None:
            mask = self.made(x)
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options).transpose(1, 2).flatten(-2)


@each_policy
@pytest.mark.parametrize(
    "mask",
    [None, ~CAUSAL, filled(CAUSAL, -torch.inf), filled(CAUSAL, LOWEST), filled(CAUSAL, -1e9)],
    ids=["none", "bool", "-inf", "finfo.min", "-1e9"],
)
def test_sdpa_is_true_with_every_mask(policy: str, mask: Tensor | None) -> None:
    compare(Sdpa, lambda model, x: model(x, mask), policy)


@each_policy
@pytest.mark.parametrize("option", ["is_causal", "enable_gqa", "scale"])
def test_sdpa_is_true_with_every_option(policy: str, option: str) -> None:
    options: dict[str, Any] = {option: 0.3 if option == "scale" else True}
    compare(lambda: Sdpa(None, **options), lambda model, x: model(x), policy)


@each_policy
def test_sdpa_draws_the_dropout_of_the_seed(policy: str) -> None:
    torch.manual_seed(0)
    model = Sdpa(dropout_p=0.5)
    wrapprec.wrap(model, policy=policy)

    def run(seed: int) -> list[Tensor]:
        model.zero_grad()
        x = torch.ones(2, 4, 8)
        torch.manual_seed(seed)
        out = model(x)
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    one, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True)) and not torch.equal(one[0], other[0])


@each_policy
@pytest.mark.parametrize("kind", ["finfo.min", "-1e9", "x.dtype", "-inf"])
def test_sdpa_is_true_with_masks_made_inside_forward(policy: str, kind: str) -> None:
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "finfo.min": lambda x: torch.full((4, 4), torch.finfo(torch.float32).min).triu(1),
        "-1e9": lambda x: torch.full((4, 4), -1e9).triu(1),
        "x.dtype": lambda x: torch.full((4, 4), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1),
        "-inf": lambda x: torch.zeros(4, 4).masked_fill(CAUSAL, float("-inf")),
    }
    compare(lambda: Sdpa(made[kind]), lambda model, x: model(x), policy)


# What others wrote


class Hand(nn.Module):
    """Attention by hand: subclasses fill the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.seen: list[torch.dtype] = []

    def scores(self, x: Tensor) -> Tensor:
        queries = self.queries(x)
        self.seen.append(queries.dtype)
        scores: Tensor = queries @ self.keys(x).transpose(-1, -2) / 8**0.5
        return scores

    def weigh(self, scores: Tensor, x: Tensor) -> Tensor:
        out: Tensor = F.softmax(scores, -1) @ self.values(x)
        return out


class Lowest(Hand):
    def forward(self, x: Tensor) -> Tensor:
        return self.weigh(self.scores(x).masked_fill(CAUSAL, torch.finfo(torch.float32).min), x)


class Literal(Hand):
    def forward(self, x: Tensor) -> Tensor:
        return self.weigh(self.scores(x).masked_fill(CAUSAL, -1e9), x)


class InPlace(Hand):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        scores[:, CAUSAL] = -1e10
        return self.weigh(scores, x)


class Foreign(Hand):
    """The limit is that of another tensor, which is float32 under op casting: as in DeBERTa."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        return self.weigh(scores.masked_fill(CAUSAL, torch.finfo(x.dtype).min), x)


class Own(Hand):
    """Right in every dtype."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        return self.weigh(scores.masked_fill(CAUSAL, torch.finfo(scores.dtype).min), x)


class Added(Hand):
    def forward(self, x: Tensor) -> Tensor:
        return self.weigh(self.scores(x) + CAUSAL * -1e9, x)


def attend(scores: Tensor) -> Tensor:
    return scores.masked_fill(CAUSAL, -1e9)


class Calls(Hand):
    """The fill stands in a function that forward calls: the Annotated Transformer's way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weigh(attend(self.scores(x)), x)


@each_policy
@pytest.mark.parametrize("kind", [Lowest, Literal, InPlace, Foreign, Own, Added, Calls])
@pytest.mark.parametrize("nested", [False, True])
def test_attention_by_hand_with_any_fill_is_true(policy: str, kind: type[Hand], nested: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), kind(), nn.Linear(8, 8)) if nested else kind()

    if kind is Added and policy == "bf16-module":
        # A float32 tensor in the arithmetic makes float32 of it, for nothing is out of range here, and the product with
        # the values is then of two dtypes: as in a model that was cast by hand, torch refuses it.
        with pytest.raises(DtypeMismatchError, match="Received: expected scalar type Float but found BFloat16"):
            compare(make, lambda model, x: model(x), policy)
        return
    compare(make, lambda model, x: model(x), policy)


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_projections_of_a_module_with_such_a_fill_stay_low_and_only_its_own_code_is_float32(policy: str) -> None:
    attention = Literal()
    model = nn.Sequential(nn.Linear(8, 8), attention)
    handle = wrapprec.wrap(model, policy=policy)
    own, below = handle.plan.placement("1"), handle.plan.placement("1.queries")
    assert own.rule == "default: 1000000000.0 is past float16's range" and own.rule in str(handle.plan)
    assert own.precision.compute_dtype == torch.float32 and own.activations == "restore"
    assert below.rule == "policy" and below.precision.compute_dtype == torch.float16
    low = []
    true = F.linear

    def linear(*args: Any, **kwargs: Any) -> Tensor:
        out = true(*args, **kwargs)
        low.append(out.dtype)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        model(torch.randn(2, 4, 8))
    assert low == [torch.float16] * 4, "the projections"
    assert attention.seen == [torch.float32], "what the module's own code gets from them"


def test_literals_matter_in_float16_only_and_the_limit_of_float32_in_bfloat16_too() -> None:
    def rule(kind: type[Hand], policy: str) -> str:
        return wrapprec.resolve(kind(), policy).placement("").rule

    assert rule(Literal, "bf16-mixed") == rule(Own, "16-mixed") == rule(Own, "bf16-mixed") == "policy"
    # bfloat16 ends at 3.39e38, float32 at 3.40e38: torch refuses the fill.
    assert rule(Lowest, "bf16-mixed") == "default: torch.finfo(torch.float32) is past bfloat16's range"
    assert rule(Foreign, "bf16-mixed") == "default: torch.finfo(x.dtype) in scores is past bfloat16's range"
    assert rule(Calls, "16-module") == "default: 1000000000.0 is past float16's range"
    assert rule(Lowest, "32-true") == "policy"


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_users_rule_wins_and_the_fill_raises_with_the_remedy(policy: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Literal())
    wrapprec.wrap(model, policy=policy, rules=[Rule("1", policy)])
    with pytest.raises(DtypeMismatchError) as caught:
        model(torch.randn(2, 4, 8))
    text = str(caught.value)
    assert "Expected numbers within the range of the dtype that a module computes in" in text
    assert "Received: value cannot be converted to type" in text and '"1" (Literal)' in text
    assert 'rules=[Rule("1", "float32")]' in text


@each_policy
@pytest.mark.parametrize("version", ["", "V2"])
def test_deberta_trains_in_every_policy_and_fails_under_autocast(policy: str, version: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"Deberta{version}Config")(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    plain = getattr(transformers, f"Deberta{version}Model")(config)
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy)
    tokens, attended = torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    attended[0, 4:] = 0

    def run(model: Any) -> list[Tensor]:
        out = model(input_ids=tokens, attention_mask=attended).last_hidden_state
        (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert_close(run(mine), run(plain), policy)
