"""Hugging Face's `generate` on a wrapped model: float32's scores within rounding, its tokens where no tie decides."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from fourfold import TOLERANCE, assert_close, each_policy, grads
from torch import Tensor

import wrapprec
from wrapprec import DtypeMismatchError

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:float16 on a CPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPT = torch.tensor([[3, 7, 1, 9, 4], [2, 2, 8, 5, 6]])
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "static cache": {"cache_implementation": "static"},
}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        # Logits of order one: with the default all tokens would be ties.
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        initializer_factor=1.5,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def generate(model: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    return model.generate(PROMPT, return_dict_in_generate=True, output_logits=True, output_scores=True, **options)


def assert_same_as_float32(got: Any, want: Any, policy: str, sampled: bool) -> None:
    """Compare row by row until a token differs, which only a tie within the rounding may bring about."""
    compared = 0
    new = len(want.logits)
    mine, true = got.sequences[:, -new:], want.sequences[:, -new:]
    for row in range(len(true)):
        for step in range(new):
            a, b = got.logits[step][row], want.logits[step][row]
            assert a.dtype == torch.float32
            # Rounding in two layers, as in the gradients; each step starts from rounded keys and values.
            bound = 2 * TOLERANCE[policy[:2]] * b.abs().max()
            assert (a - b).abs().max() <= bound
            compared += 1
            if mine[row, step] != true[row, step]:
                assert sampled or b[true[row, step]] - b[mine[row, step]] <= 2 * bound
                break
    assert compared >= new, "too few tokens were compared"


def assert_identical(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


@each_policy
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [llama, t5])
def test_tokens_and_scores_are_float32s_and_frozen_changes_nothing(make: Any, mode: str, policy: str) -> None:
    if make is llama and mode == "static cache" and policy.endswith("mixed"):
        pytest.skip("refused: the next test")
    options = MODES[mode]
    want = generate(make(), **options)
    model = make()
    handle = wrapprec.wrap(model, policy=policy)
    got = generate(model, **options)
    assert_same_as_float32(got, want, policy, sampled=mode == "sampling")
    with handle.frozen():
        assert_identical(generate(model, **options), got)
    assert_identical(generate(model, **options), got)


@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed"])
def test_static_cache_that_takes_keys_and_values_for_one_dtype_is_refused_as_under_autocast(policy: str) -> None:
    """Rotary embeddings make the keys float32, autocast the values half; the cache is made in the keys' dtype."""
    model = llama()
    wrapprec.wrap(model, policy=policy)
    with pytest.raises(DtypeMismatchError) as caught:
        generate(model, **MODES["static cache"])
    text = str(caught.value)
    assert "Received: index_copy_()" in text and "layers.0.self_attn" in text and "Remedy" in text
    dtype = torch.bfloat16 if policy.startswith("bf") else torch.float16
    with torch.autocast("cpu", dtype=dtype), pytest.raises(RuntimeError, match="index_copy_"):
        generate(llama(), **MODES["static cache"])


@each_policy
@pytest.mark.parametrize("frozen", [False, True])
def test_beam_search_finds_hypotheses_as_probable_as_float32s(policy: str, frozen: bool) -> None:
    want = generate(llama(), num_beams=3)
    model = llama()
    handle = wrapprec.wrap(model, policy=policy)
    with handle.frozen() if frozen else contextlib.nullcontext():
        got = generate(model, num_beams=3)
    # The mean log probability of eight tokens: as exact as the logits are, whose size is about ten.
    bound = 2 * TOLERANCE[policy[:2]] * want.logits[0].abs().max()
    assert (got.sequences_scores - want.sequences_scores).abs().max() <= bound
    # What was found is what it says: float32 gives these tokens the same scores.
    scored = llama()(got.sequences).logits[:, 4:-1].log_softmax(-1).gather(-1, got.sequences[:, 5:, None])
    assert (scored.squeeze(-1).mean(-1) - got.sequences_scores).abs().max() <= bound


@each_policy
def test_training_goes_on_after_generating_in_between(policy: str) -> None:
    plain, mine = llama(), llama()
    handle = wrapprec.wrap(mine, policy=policy)
    for model in (plain, mine):
        for step in range(2):
            model.eval()
            with handle.frozen() if step and model is mine else contextlib.nullcontext():
                generate(model, max_new_tokens=2)
            model.train()
            model.zero_grad()
            # Small enough for 2**16 times its gradients to be finite in float16.
            (model(PROMPT, labels=PROMPT).loss / 32).backward()
    # Two layers with attention: twice the roundings of the small models that the tolerance is for.
    assert_close(grads(mine), grads(plain), policy, slack=2)
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in vars(mine).values())
