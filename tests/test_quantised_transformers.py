"""Quantised Hugging Face models: Llama and GPT-2 generate and train adapters, with PEFT too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantised import BF16, F32, in_float64
from torch import Tensor

import wrapprec

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

IDS = torch.tensor([[3, 7, 1, 9, 4], [2, 2, 8, 5, 6]])


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32,
        n_embd=48,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def scores(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids).logits
    return out


@pytest.mark.parametrize("form", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_scores_are_those_of_the_dequantised_model(make: Any, form: str) -> None:
    model = make().requires_grad_(False)
    # In float32, where only the weights differ: two layers of a random model amplify bfloat16's rounding.
    handle = wrapprec.wrap(model, policy=f"params={form},compute=float32")
    quantised = [p for p in model.parameters() if not p.is_floating_point()]
    assert len(quantised) == (15 if make is llama else 8)
    want = scores(in_float64(model), IDS)
    assert (scores(model, IDS).double() - want).norm() <= 10 * F32 * want.norm()
    handle.unwrap()
    assert all(p.dtype is torch.float32 and p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generate_gives_the_tokens_of_a_forward_without_cache(make: Any) -> None:
    model = make().requires_grad_(False)
    handle = wrapprec.wrap(model, policy="nf4")
    with handle.frozen():
        got = model.generate(IDS, max_new_tokens=6, do_sample=False)
        out = scores(model, got)
    margin = out.topk(2).values.diff().abs().squeeze(-1)
    for position in range(IDS.shape[1], got.shape[1]):
        best = out[:, position - 1].argmax(-1)
        # Where no tie within bfloat16's rounding decides.
        sure = margin[:, position - 1] > BF16 * out.abs().max()
        assert torch.equal(got[sure, position], best[sure])


@pytest.mark.parametrize("form", ["nf4-dq", "int8"])
def test_conv1d_is_saved_and_loaded(form: str, tmp_path: Path) -> None:
    model, plain = gpt2().requires_grad_(False), gpt2()
    handle = wrapprec.wrap(model, policy=form)
    name = "transformer.h.0.attn.c_attn"
    keys = {key for key in model.state_dict() if key.startswith(f"{name}.")}
    extra = {"SCB", "weight_format"} if form == "int8" else {"weight.absmax", "weight.nested_absmax"}
    assert {f"{name}.{key}" for key in extra} <= keys
    torch.save(model.state_dict(), tmp_path / "model.pt")
    want = scores(model, IDS)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
    model.load_state_dict(plain.state_dict())
    assert not torch.equal(scores(model, IDS), want)
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(scores(model, IDS), want)
    handle.unwrap()
    plain.load_state_dict(model.state_dict())


# PEFT reads the sizes of a Conv1D off its weight: before it is quantised.
@pytest.mark.parametrize(("make", "wraps"), [(llama, "after"), (llama, "before"), (gpt2, "after")])
def test_peft_adapters_train_on_a_quantised_base(make: Any, wraps: str) -> None:
    peft = pytest.importorskip("peft")
    model = make().requires_grad_(False)
    linear, row = ("q_proj", False) if make is llama else ("c_attn", True)
    config = peft.LoraConfig(r=4, target_modules=[linear], task_type="CAUSAL_LM", fan_in_fan_out=row)
    if wraps == "before":
        handle = wrapprec.wrap(model, policy="params=nf4,compute=float32")
        model = peft.get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        handle.attach(optimizer)
    else:
        model = peft.get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        handle = wrapprec.wrap(model, optimizer, "params=nf4,compute=float32")
    reference = in_float64(model)
    reference(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    want = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert want.keys() == adapters.keys() and all("lora" in name for name in want)
    for name, param in adapters.items():  # the gradient of lora_A is 0 at first
        assert (param.grad.double() - want[name]).norm() <= 10 * F32 * want[name].norm()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    wrapprec.unwrap(model)
    model.eval()
    want = scores(model, IDS)
    # Merged into the dequantised weights.
    assert (scores(model.merge_and_unload(), IDS) - want).norm() <= 10 * F32 * want.norm()
