"""What `test_sharded` checks, in every process of a group: models, policies and checkpoints beside `fsdp_checks`."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ddp_checks import data, marking, mine, near, same_everywhere, tolerance
from fsdp_checks import agreed, build, grads, net, raises, reference, scale_of, shard, split, weights
from fsdp_checks import backward as backward_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import wrapprec
from wrapprec import LossScale

CHECKS: dict[str, Callable[[str], None]] = {}
"""By name; each takes a policy, and raises where it fails. All processes run them in the same order."""

check_with = marking(CHECKS)


class Bare(nn.Module):
    """Linear layers alone, which nothing keeps in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 17), nn.Linear(17, 4)  # 17 rows: shards of two sizes

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(torch.tanh(self.up(x)))
        return down


def is_unwrapped(model: nn.Module) -> bool:
    return wrapprec.handle_of(model) is None and all("forward" not in m.__dict__ for m in model.modules())


# Weights that are stored otherwise


@check_with("bf16-true", "16-true")
def low_precision_weights_are_refused_with_a_remedy_that_works(policy: str) -> None:
    dtype = torch.bfloat16 if policy == "bf16-true" else torch.float16
    remedy = 'Remedy: use a mixed policy, with fully_shard(module, mp_policy=wrapprec.fsdp_policy("bf16-mixed"))'
    model = shard(net(), policy)
    with raises(wrapprec.PolicyError, "Received: a model that fully_shard was applied to", remedy):
        wrapprec.wrap(model, None, policy)
    assert is_unwrapped(model)
    # Converted before, which leaves nothing to convert: rounding has no stand-ins for shards.
    model = shard(net(Bare).to(dtype), policy)
    with raises(wrapprec.PolicyError, f"to keep what {str(dtype)[6:]} loses", "Where: 'up.weight'", remedy):
        wrapprec.wrap(model, None, policy)
    assert is_unwrapped(model)
    model, plain = net(Bare), net(Bare)
    _, handle = build(model, "bf16-mixed")
    backward_of(model)
    near(grads(model), reference(plain, [data()]), tolerance("bf16-mixed"))
    handle.unwrap()


@check_with("64-true")
def float64_weights_are_converted_before_they_are_sharded(policy: str) -> None:
    model = shard(net(), policy)
    with raises(wrapprec.PolicyError, "Remedy: call model.double() before the weights are distributed"):
        wrapprec.wrap(model, None, policy)
    model, plain = net().double(), net().double()
    _, handle = build(model, policy)
    x, y = (part.double() for part in data())
    F.mse_loss(model(mine(x)), mine(y)).backward()
    F.mse_loss(plain(x), y).backward()
    for got, want in zip(grads(model).values(), grads(plain).values(), strict=True):
        assert got is not None and torch.allclose(got, want, rtol=1e-12, atol=1e-14)  # float64, in another order
    handle.unwrap()


@check_with("nf4", "int8")
def weight_formats_are_refused(policy: str) -> None:
    for model in (shard(net().requires_grad_(False), "bf16-mixed"), split_over_all(net())):
        model.requires_grad_(False)
        wanted = f"Expected weights that are plain tensors, to store as {policy}"
        with raises(wrapprec.PolicyError, wanted, "Received: a DTensor of shape", "Remedy: use bf16-mixed"):
            wrapprec.wrap(model, None, policy)
        assert is_unwrapped(model)


def split_over_all(model: Any) -> Any:
    return split(model, init_device_mesh("cpu", (dist.get_world_size(),)))


@check_with("64-true", "bf16-true", "int8-training")
def tensor_parallel_weights_are_neither_converted_nor_quantised(policy: str) -> None:
    model = split_over_all(net())
    remedies = {"64-true": "call model.double() before", "bf16-true": "use a mixed policy"}
    with raises(wrapprec.PolicyError, "Received: a DTensor of shape", remedies.get(policy, "use bf16-mixed")):
        wrapprec.wrap(model, None, policy)
    assert is_unwrapped(model)


@check_with("bf16-mixed", "16-mixed")
def optimizer_state_of_few_bits_is_torchaos(policy: str) -> None:
    """`optimizer_bits` is refused; its remedy trains as AdamW in float32 does, but for the state's rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that a CPU has not
        from torchao.optim import AdamW4bit, AdamW8bit

    def wide() -> Any:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 1024), nn.Tanh(), nn.Linear(1024, 4))

    # Its steps are compiled, which takes longer than all the rest: here they run as they are written.
    torch.compiler.set_stance("force_eager")
    for bits, kind in ((8, AdamW8bit), (4, AdamW4bit)):
        model, plain = wide(), wide()
        shard(model, policy)
        torchs = torch.optim.AdamW(model.parameters())
        with raises(wrapprec.PolicyError, "torchao.optim.AdamW8bit or AdamW4bit after sharding"):
            wrapprec.wrap(model, torchs, policy, optimizer_bits=bits)
        assert is_unwrapped(model)
        optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.0)
        handle = wrapprec.wrap(model, optimizer, policy, **scale_of(policy))
        adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
        for step in range(4):
            for one, its in ((model, optimizer), (plain, adam)):
                its.zero_grad()
                x, y = data(step)
                x, y = (x, y) if one is plain else (mine(x), mine(y))
                F.mse_loss(one(x), y).backward()
                its.step()
        # Adam moves each weight by 1e-3 a step; 4 bits, and gradients that change sign, take a quarter of that.
        moved = [p.detach() - q for p, q in zip(plain.parameters(), wide().parameters(), strict=True)]
        for got, want, way in zip(weights(model), plain.parameters(), moved, strict=True):
            assert (got - want).norm() < 0.25 * way.norm()
        handle.unwrap()
    torch.compiler.set_stance("default")


# Real models


def language_model(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, when it is imported
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(1)
    if kind == "gpt2":
        no = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, **no))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, tie_word_embeddings=True, **sizes))


def words(step: int = 0) -> Tensor:
    return torch.randint(0, 64, (4 * dist.get_world_size(), 12), generator=torch.Generator().manual_seed(step))


@check_with("bf16-mixed", "16-mixed", "bf16-module", "16-module")
def tied_language_models_have_true_gradients(policy: str) -> None:
    """Sharded block by block; embedding and head, which share a weight, are the root's."""
    for kind in ("gpt2", "llama"):
        model, plain = language_model(kind), language_model(kind)
        told = wrapprec.fsdp_policy(policy)
        for block in model.transformer.h if kind == "gpt2" else model.model.layers:
            fully_shard(block, mp_policy=told)
        fully_shard(model, mp_policy=told)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        handle = wrapprec.wrap(model, optimizer, policy, **scale_of(policy))
        ids = words()
        model(input_ids=mine(ids, 4), labels=mine(ids, 4)).loss.backward()
        plain(input_ids=ids, labels=ids).loss.backward()
        # Each of the two blocks is as deep as the model that the tolerance was made for.
        near(grads(model), grads(plain), 3 * tolerance(policy))
        before = weights(model)
        (model(input_ids=mine(ids, 4), labels=mine(ids, 4)).loss * (2.0**24 if dist.get_rank() == 1 else 1)).backward()
        optimizer.step()
        assert handle.step_was_skipped is policy.startswith("16")
        assert all(map(torch.equal, weights(model), before)) is handle.step_was_skipped
        agreed(handle, model)
        handle.unwrap()


@check_with("bf16-mixed", "16-module")
def adapters_beside_frozen_weights_have_true_gradients(policy: str) -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16)
            self.weight.requires_grad_(False)
            self.into, self.out = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x) + self.out(self.into(x)))

    def adapted() -> Any:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16).requires_grad_(False), Adapted(), Adapted(), nn.Linear(16, 4))
        return model

    model, plain = adapted(), adapted()
    for layer in model[1:3]:
        fully_shard(layer, mp_policy=wrapprec.fsdp_policy(policy))
    _, handle = build(model, policy)
    backward_of(model)
    near(grads(model), reference(plain, [data()]), tolerance(policy))
    handle.unwrap()


# Checkpoints of another number of processes


@check_with("16-mixed", "bf16-mixed")
def state_saved_by_two_processes_is_loaded_by_four_and_by_one(policy: str) -> None:
    def adam(params: Any) -> Any:
        return torch.optim.AdamW(params, lr=0.01)

    def train(model: Any, optimizer: Any, step: int, rows: slice) -> None:
        x, y = data(step)
        optimizer.zero_grad()
        (F.mse_loss(model(x[rows]), y[rows]) * (2.0**24 if step == 1 else 1.0)).backward()
        optimizer.step()

    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch.distributed.checkpoint's own (2.9)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # where one process loads by itself
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    rank, scale = dist.get_rank(), LossScale(init_scale=64.0, growth_interval=3)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))
    model = net()
    optimizer, handle = build(model, policy, scale, kind=adam, mesh=pairs["shard"])
    half = slice(0, 16) if rank % 2 == 0 else slice(16, 32)
    for step in range(3):
        train(model, optimizer, step, half)
    states = get_state_dict(model, optimizer)
    if rank < 2:
        group = pairs["shard"].get_group()
        dcp.save(
            {"model": states[0], "optimizer": states[1], "handle": handle},
            checkpoint_id=folders[0],
            process_group=group,
        )
    dist.barrier()
    saved = handle.state_dict()
    assert handle.skipped_steps == (1 if policy.startswith("16") else 0)
    train(model, optimizer, 3, half)
    for processes in (4, 1):
        other = net(seed=2)
        if processes == 4:
            its, its_handle = build(other, policy, scale, kind=adam)
        else:
            its = adam(other.parameters())
            its_handle = wrapprec.wrap(other, its, policy, **scale_of(policy, scale))
        states = get_state_dict(other, its)
        read = {"model": states[0], "optimizer": states[1], "handle": its_handle}
        dcp.load(read, checkpoint_id=folders[0], no_dist=processes == 1)
        set_state_dict(other, its, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
        assert its_handle.state_dict() == saved
        same_everywhere(*weights(other))
        train(other, its, 3, slice(8 * rank, 8 * rank + 8) if processes == 4 else slice(0, 32))
        for got, want in zip(weights(other), weights(model), strict=True):
            # One step of 0.01, by a mean that was summed up in another order, of low precision gradients.
            assert (got - want).abs().mean() < 0.01 * 4 * tolerance(policy)
        its_handle.unwrap()
    handle.unwrap()
