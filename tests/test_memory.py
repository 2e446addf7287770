"""What a plan predicts of bytes, against what is counted: in storages of one process, in collectives of two."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_checks import leave
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import wrapprec
from wrapprec import Plan, PolicyError
from wrapprec.footprint import state_of
from wrapprec.memory import Weight

POLICIES = ["32-true", "bf16-mixed", "16-mixed", "bf16-module", "16-module"]


class Tied(nn.Module):
    """An embedding whose weight is the head's, too, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)) for _ in range(3))
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.frozen(self.embed(ids))
        for block in self.blocks:
            h = h + torch.relu(block(h))
        return self.head(h)


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def ids() -> Tensor:
    return torch.randint(50, (2, 7))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "tied": (Tied, ids),
    "convolutional": (convolutional, lambda: torch.randn(2, 3, 8, 8)),
    "llama": (llama, ids),
}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return (out if isinstance(out, Tensor) else out.logits).float().square().mean()


def bytes_of(tensors: Any) -> int:
    """Of distinct storages; step counters are no matter."""
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors if t.shape != ()}.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_foresees_what_training_holds(name: str, policy: str) -> None:
    make, data = MODELS[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    foreseen = wrapprec.resolve(model, policy).memory(optimizer)
    wrapprec.wrap(model, optimizer, policy, loss_scale=16.0 if policy.startswith("16") else None)
    lent: dict[int, Tensor] = {}
    shapes = {p.shape for p in model.parameters() if p.dim() > 1}

    def note(tensor: Tensor) -> Tensor:
        turned = tensor.t().shape if tensor.dim() == 2 else None
        if tensor.dtype in (torch.bfloat16, torch.float16) and shapes & {tensor.shape, turned}:
            lent[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model, data())
    loss.backward()
    optimizer.step()
    state = [s for one in optimizer.state.values() for s in one.values()]
    assert foreseen.weights == bytes_of(model.parameters())
    assert foreseen.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    assert foreseen.state == bytes_of(state)
    assert foreseen.master == 0
    assert foreseen.elements == sum(p.numel() for p in model.parameters())
    # Biases and gains, which are left out here, and what autograd need not save, are less than a tenth.
    assert bytes_of(lent.values()) <= foreseen.lent <= 1.1 * bytes_of(lent.values()) + 4096 * (policy != "32-true")


class Adapted(nn.Module):
    """Frozen matrices under a trained adapter, as fine-tuning has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 128)
        self.base = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).requires_grad_(False)
        self.down, self.up = nn.Linear(128, 64, bias=False), nn.Linear(64, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.down(self.base(self.embed(ids))))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(96, 256), nn.LayerNorm(256), nn.Linear(256, 128), nn.Linear(128, 10))


LARGER: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "adapted": (Adapted, ids),
    "wide": (wide, lambda: torch.randn(4, 96)),
    "llama": (llama, ids),
}


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    """Of quantised state, which is kept in dicts, too; step counters are no matter."""
    return bytes_of(t for one in optimizer.state.values() for t in tree_leaves(one) if isinstance(t, Tensor))


@pytest.mark.parametrize("policy", ["bf16-true", "bf16-true,rounding=stochastic", "16-true,rounding=none", "64-true"])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", LARGER)
def test_a_plan_foresees_low_precision_weights_and_state(name: str, bits: int | None, policy: str) -> None:
    if bits:
        pytest.importorskip("bitsandbytes")
    make, data = LARGER[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    foreseen = wrapprec.resolve(model, policy).memory(optimizer, optimizer_bits=bits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wrapprec.WrapprecWarning)  # of float16 weights that lose updates
        handle = wrapprec.wrap(model, optimizer, policy, optimizer_bits=bits)
    loss_of(model, data()).backward()
    optimizer.step()
    assert foreseen.weights == bytes_of(model.parameters())
    assert foreseen.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    assert foreseen.state == bytes_of_state(optimizer)
    saved = handle.state_dict().get("rounding", [None])[0]
    assert foreseen.master == bytes_of([] if saved is None else saved["rests"].values())


@pytest.mark.parametrize("form", ["nf4", "nf4-dq", "int8"])
def test_a_plan_foresees_quantised_weights(form: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = Adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    foreseen = wrapprec.resolve(model, form).memory(optimizer)
    wrapprec.wrap(model, optimizer, form)
    loss_of(model, ids()).backward()
    optimizer.step()
    # The scales are kept beside the parameters.
    scales = foreseen.weights - bytes_of(model.parameters())
    assert 0 < scales <= 0.13 * 2 * 128 * 256
    assert foreseen.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    assert foreseen.state == bytes_of_state(optimizer)


def test_bytes_of_a_mix_are_printed_by_module() -> None:
    plan = wrapprec.resolve(Adapted(), "bf16-mixed", rules=[("base", "nf4"), ("up", "bf16-true")])
    table = [line.split() for line in str(plan).splitlines()]
    rows = {line[0]: line[3:6] for line in table if len(line) > 6}
    # 4.5 bits an element of the matrix, 32 of the bias, and a table of 64 bytes.
    assert rows["base.0"] == [f"{(128 * 256 * 4.5 / 8 + 64 + 4 * 256) / (128 * 256 + 256):.3g}", "0", "0"]
    assert rows["up"] == ["2", "2", "2"]
    assert rows["down"] == ["4", "4", "0"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("policy", ["bf16-true", "16-true"])
def test_weights_that_hooks_compute_others_from_are_planned_as_wide_as_they_stay(policy: str) -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 96)), nn.Linear(96, 64))
    foreseen = wrapprec.resolve(model, policy).memory()
    optimizer = torch.optim.AdamW(model.parameters())
    handle = wrapprec.wrap(model, optimizer, policy)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    (kept,) = handle.state_dict()["rounding"]
    assert foreseen.weights == bytes_of(model.parameters())
    assert foreseen.gradients == bytes_of(p.grad for p in model.parameters())
    assert foreseen.master == bytes_of(kept["rests"].values())


def test_weights_that_have_the_dtype_they_compute_in_are_not_lent() -> None:
    model = llama()
    assert wrapprec.resolve(model, "bf16-true").memory().lent == 0
    assert wrapprec.resolve(model, "bf16-module").memory().lent > 0


def test_quantised_weights_are_not_planned_for_many_devices() -> None:
    plan = wrapprec.resolve(nn.Linear(64, 64).requires_grad_(False), "nf4")
    with pytest.raises(PolicyError) as raised:
        plan.memory(shards=2)
    assert str(raised.value) == (
        "Expected weights of torch's dtypes, to be spread over several devices.\n"
        "Received: quantised ones, and shards=2\n"
        "Where: ''\n"
        "Remedy: leave shards out: every device holds all of them"
    )
    assert plan.memory(replicas=2).weights == plan.memory().weights


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adafactor", "Muon", "ASGD"])
def test_the_state_of_an_optimizer_is_foreseen_by_its_class(kind: str) -> None:
    shape = (48, 64)
    param = nn.Parameter(torch.ones(shape))
    param.grad = torch.ones(shape)
    optimizer = getattr(torch.optim, kind)([param])
    optimizer.step()
    held = sum(s.nbytes for s in optimizer.state[param].values() if isinstance(s, Tensor) and s.shape != ())
    asked = shape, torch.float32, False
    assert state_of(kind)(*asked) == state_of(type(optimizer))(*asked) == state_of(optimizer)(*asked) == held


def test_an_optimizer_is_foreseen_with_its_own_options_and_left_alone() -> None:
    param = nn.Parameter(torch.ones(10, 10))
    with_momentum = torch.optim.SGD([param], lr=0.1, momentum=0.9, fused=True)
    amsgrad = torch.optim.AdamW([param], amsgrad=True)
    assert state_of(with_momentum)((10, 10), torch.float32, False) == 400
    assert state_of(amsgrad)((10, 10), torch.float32, False) == 1200
    assert not with_momentum.state and not amsgrad.state and with_momentum.param_groups[0]["fused"]


def test_groups_and_optimizers_are_foreseen_each_with_its_settings() -> None:
    """The state of a whole model: Muon for the matrices, two groups of AdamW for the others."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 30), nn.Linear(30, 30), Conv1D(40, 30))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    small = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": small[:1], "amsgrad": True}, {"params": small[1:]}]
    optimizers = [torch.optim.Muon(matrices), torch.optim.AdamW(groups)]
    foreseen = wrapprec.resolve(model, "bf16-mixed").memory(optimizers)
    wrapprec.wrap(model, optimizers, "bf16-mixed")
    model(torch.randn(2, 20)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert foreseen.state == sum(bytes_of_state(optimizer) for optimizer in optimizers)
    assert not any(key in state for state in optimizers[0].state.values() for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit", "AdamW", "SGD"])
@pytest.mark.parametrize("policy", ["32-true", "bf16-true"])
def test_the_state_of_bitsandbytes_is_foreseen(name: str, policy: str) -> None:
    """Its tables of levels are there once, and not for each of many small layers."""
    import bitsandbytes

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    options = {"optim_bits": 8} if name in ("AdamW", "SGD") else {}
    kind = getattr(bitsandbytes.optim, name)
    optimizer = kind(model.parameters(), lr=1e-3, **options, **({"momentum": 0.9} if name == "SGD" else {}))
    foreseen = wrapprec.resolve(model, policy).memory(optimizer)
    wrapprec.wrap(model, optimizer, policy)
    model(torch.randn(2, 64)).float().sum().backward()
    optimizer.step()
    held = bytes_of_state(optimizer)
    assert held < 3.5 * sum(p.numel() for p in model.parameters()), "of 8 bits, three averages at most"
    # The tables, 1 KiB each, once: two at most.
    assert foreseen.state <= held <= foreseen.state + 2048


def test_a_model_without_storage_is_planned_for_many_devices() -> None:
    with torch.device("meta"):
        model = llama()
    plan = wrapprec.resolve(model, "bf16-mixed", device="cpu")
    one, eight = plan.memory(), plan.memory(shards=8)
    assert eight.total == one.total / 8
    assert one.total == 16 * one.elements
    assert one.sent == 0
    replicated = plan.memory(replicas=4)
    assert replicated.total == one.total
    assert replicated.sent == 4 * one.elements * 2 * 3 / 4


def test_memory_goes_with_the_plan_into_plain_data() -> None:
    plan = wrapprec.resolve(Tied(), "bf16-module")
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.memory() == plan.memory()


@pytest.mark.parametrize("bad", [0, -1, 1.5, "8"])
def test_a_number_of_devices_is_positive(bad: Any) -> None:
    with pytest.raises(PolicyError, match=r"positive number of shards.*\n?.*Received: "):
        wrapprec.resolve(Tied(), 32).memory(shards=bad)


def test_an_unknown_optimizer_is_refused_with_the_nearest() -> None:
    with pytest.raises(PolicyError, match=r"'AdamWW'.*\n?.*adamw"):
        wrapprec.resolve(Tied(), 32).memory("AdamWW")
    with pytest.raises(PolicyError, match=r"one step of one parameter[\s\S]*LBFGS"):
        wrapprec.resolve(Tied(), 32).memory("LBFGS")


def test_shapes_of_a_weight_multiply() -> None:
    assert Weight("w", (), torch.float32, True).elements == 1
    assert Weight("w", (0, 3), torch.float32, True).stored == 0


# Two processes


class Collectives(TorchDispatchMode):
    """Adds up the larger side, the whole tensor, of what goes through each kind of collective."""

    def __init__(self, seen: dict[str, float]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            whole = max(arg.nbytes for arg in tree_leaves(args) if isinstance(arg, Tensor))
            self.seen[name] = self.seen.get(name, 0) + whole
        return func(*args, **(kwargs or {}))


def _sent_by_ddp(seen: dict[str, float]) -> None:
    def note(_, bucket):  # type: ignore[no-untyped-def]  # torch looks at the hints, which are text here
        seen["ddp"] = seen.get("ddp", 0) + bucket.buffer().nbytes
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model = Tied()
    wrapprec.wrap(model, policy="bf16-mixed")
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, note)
    loss_of(ddp, ids()).backward()


def _sent_by_fsdp(seen: dict[str, float]) -> None:
    model = Tied()
    casts = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=casts)
    fully_shard(model, mp_policy=casts)
    with torch.autocast("cpu", torch.bfloat16), Collectives(seen):
        loss_of(model, ids()).backward()
    seen["shard"] = sum(p.to_local().nbytes for p in model.parameters())


def _count(rank: int, rendezvous: str, report: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    seen: dict[str, float] = {}
    _sent_by_ddp(seen)
    _sent_by_fsdp(seen)
    torch.save(seen, f"{report}{rank}")
    leave()


def test_what_is_sent_is_what_two_processes_hand_to_their_collectives(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_count, (str(tmp_path / "meet"), str(tmp_path / "report")), nprocs=2)
    seen = torch.load(tmp_path / "report0")
    plan = wrapprec.resolve(Tied(), "bf16-mixed")
    # Of a ring of two, each sends the whole of what it reduces, and half of what it gathers or scatters.
    assert plan.memory(replicas=2).sent == seen["ddp"]
    sharded = plan.memory(shards=2)
    assert set(seen) == {"ddp", "shard", "_allgather_base_", "_reduce_scatter_base_"}
    counted = (seen["_allgather_base_"] + seen["_reduce_scatter_base_"]) / 2
    # Sharded along the first dimension, padded to a multiple of the number of devices.
    assert sharded.sent == pytest.approx(counted, rel=0.02)
    assert sharded.weights == pytest.approx(seen["shard"], rel=0.02)
