"""Whole models, parts of them, training steps and optimizers under torch.compile; `test_traced` has the first steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from wrapprec import LossScale, wrap

POLICIES = ["16-mixed", "bf16-mixed", "16-module", "bf16-module"]
each_policy = pytest.mark.parametrize("policy", POLICIES)
scaled_policy = pytest.mark.parametrize("policy", ["16-mixed", "16-module"])

# Relative rounding of a product of a few low precision operations: 2**-8 (bf16), 2**-11 (f16) each. A wrong border is
# off by the scale, 2**10 or more.
TOLERANCE = {"16": 0.015, "bf": 0.06}

Gradients = dict[str, Tensor]


def skip_where_parts_run_in_pieces(policy: str) -> None:
    if torch.__version__ < (2, 13) and policy.startswith("16"):
        pytest.skip("before torch 2.13 no part lends in its graph under a loss scale")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Attention and a feed-forward part; `breaks` breaks the graph in between."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.drop = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.0)
        self.breaks = breaks
        self.eager: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.eager.append(True)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        if self.breaks:
            torch._dynamo.graph_break()
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return out


class Net(nn.Module):
    """Embedding, a position parameter used directly, two blocks, a head tied to the embedding."""

    def __init__(self, reentrant: bool | None = None, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 16)
        self.place = nn.Parameter(torch.randn(32, 16) * 0.1)
        self.blocks = nn.ModuleList([Block(breaks), Block(breaks)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.emb.weight
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens) + self.place[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        out: Tensor = self.head(self.norm(x))
        return out


class Images(nn.Module):
    """Convolutions, batch norm, a transformer layer of torch, a part that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.norm = nn.Conv2d(3, 16, 2, 2), nn.BatchNorm2d(16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 11)
        for param in self.patches.parameters():
            param.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.patches(x))).flatten(2).mT
        out: Tensor = self.head(self.encoder(x))
        return out


def tokens_of(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(batch))


def pictures() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def loss_of(out: Tensor, factor: float = 0.125) -> Tensor:
    target = torch.arange(out.shape[:-1].numel()) % 11
    return F.cross_entropy(out.flatten(0, -2), target) * factor


def grads(model: nn.Module) -> Gradients:
    # What torch.compile returned for a module puts itself into the name.
    named = ((name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters())
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def reference(make: Callable[[], nn.Module], x: Tensor) -> Gradients:
    model = make()
    loss_of(model(x)).backward()
    return grads(model)


def assert_same(got: Gradients, want: Gradients, policy: str) -> None:
    assert got.keys() == want.keys()
    for name, true in want.items():
        off = (got[name] - true).norm() / true.norm().clamp(min=1e-30)
        assert got[name].dtype == torch.float32 and off <= TOLERANCE[policy[:2]], f"{name}: relative error {off:.2e}"


def scale_for(policy: str) -> LossScale | None:
    return LossScale(init_scale=2.0**10, growth_interval=1) if policy.startswith("16") else None


# Whole models


@pytest.mark.parametrize(
    ("policy", "backend"),
    [(p, "aot_eager") for p in POLICIES] + [("16-mixed", "inductor"), ("bf16-module", "inductor")],
)
def test_images_compile_whole_with_true_gradients(policy: str, backend: str) -> None:
    x = pictures()
    want = reference(Images, x)
    model, plain = Images(), Images()
    wrap(model, policy=policy, loss_scale=scale_for(policy))
    counter = CompileCounterWithBackend(backend)
    out = torch.compile(model, backend=counter, fullgraph=True)(x)
    loss_of(out).backward()
    assert_same(grads(model), want, policy)
    assert out.dtype == torch.float32 and counter.frame_count == 1
    assert model.patches.weight.grad is None
    plain(x)
    # The statistics are taken in float32 from activations of low precision.
    assert torch.allclose(model.norm.running_mean, plain.norm.running_mean, atol=2**-8)
    assert model.norm.running_mean.dtype == torch.float32 and int(model.norm.num_batches_tracked) == 1


@pytest.mark.parametrize(("policy", "when"), list(zip(POLICIES, ["before", "after"] * 2, strict=True)))
def test_dynamic_shapes_are_not_compiled_for_again(policy: str, when: str) -> None:
    model = Net()
    counter = CompileCounterWithBackend("aot_eager")
    call: Any = torch.compile(model, backend=counter, fullgraph=True, dynamic=True) if when == "before" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wrap(model, optimizer, policy, loss_scale=scale_for(policy))
    if when == "after":
        call = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for x in (tokens_of(2, 5), tokens_of(3, 7), tokens_of(4, 6)):
        optimizer.zero_grad()
        loss_of(call(x)).backward()
        assert_same(grads(model), reference(Net, x), policy)
        optimizer.step()
        counts.append(counter.frame_count)
    # The second size is compiled anew for the plain model too.
    assert counts[2] == counts[1] <= 2 and not counters["graph_break"]
    # The scale has grown at every step, and nothing was compiled for it.
    assert handle.scale == (2.0**13 if policy.startswith("16") else 1.0)


@each_policy
def test_call_under_no_grad_and_then_with_gradients(policy: str) -> None:
    x = tokens_of()
    want = reference(Net, x)
    model = Net()
    wrap(model, policy=policy, loss_scale=scale_for(policy))
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        with torch.no_grad():
            assert not call(x).requires_grad
        loss_of(call(x)).backward()
        assert_same(grads(model), want, policy)
    assert counter.frame_count == 2, "one graph with gradients, and one without"


@each_policy
def test_reduce_overhead_is_accepted_on_a_cpu(policy: str) -> None:
    linear = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    plain = copy.deepcopy(linear)
    plain(x).square().mean().backward()
    wrap(linear, policy=policy, loss_scale=scale_for(policy))
    torch.compile(linear, mode="reduce-overhead", fullgraph=True)(x).square().mean().backward()
    assert_same(grads(linear), grads(plain), policy)


@each_policy
@pytest.mark.parametrize("whole", [True, False])
def test_checkpoints_inside_a_compiled_model_have_true_gradients(policy: str, whole: bool) -> None:
    if not whole:
        skip_where_parts_run_in_pieces(policy)
    x = tokens_of()
    want = reference(Net, x)
    model = Net(reentrant=False)
    wrap(model, policy=policy, loss_scale=scale_for(policy))
    counter = CompileCounterWithBackend("aot_eager")
    if whole:
        call: Any = torch.compile(model, backend=counter, fullgraph=True)
    else:
        call = model
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
    loss_of(call(x)).backward()
    assert_same(grads(model), want, policy)
    assert not counters["graph_break"]


# The eager backend alone: what is taken apart is what dynamo sees, whatever compiles the pieces.
@each_policy
@pytest.mark.parametrize("backend", ["eager"])
def test_graph_breaks_inside_forward_change_no_gradient(policy: str, backend: str) -> None:
    x = tokens_of()
    want = reference(Net, x)
    model = Net(breaks=True)
    wrap(model, policy=policy, loss_scale=scale_for(policy))
    call = torch.compile(model, backend=backend)
    loss_of(call(x)).backward()
    assert_same(grads(model), want, policy)
    assert counters["graph_break"], "or this shows nothing"
    assert type(model.head._parameters["weight"]) is nn.Parameter


@scaled_policy
def test_what_dynamo_gives_up_on_runs_eagerly_with_true_gradients(policy: str) -> None:
    x = tokens_of()
    want = reference(Net, x)
    model = Net(breaks=True)
    wrap(model, policy=policy, loss_scale=scale_for(policy))
    with torch._dynamo.config.patch(recompile_limit=1):
        loss_of(torch.compile(model, backend="eager")(x)).backward()
    assert_same(grads(model), want, policy)


@scaled_policy
def test_two_scales_divide_the_weights_of_a_compiled_model_within_another(policy: str) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.layer, self.inner = nn.Linear(8, 8), [inner]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.inner[0](self.layer(x)))
            return out

    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        outer = Outer(inner)
        call: Any = outer
        if wrapped:
            wrap([outer, inner], policy=policy, loss_scale=32)
            call = torch.compile(outer, backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        call(torch.randn(4, 8)).square().mean().backward()
        results.append({**grads(outer), **{f"inner.{k}": v for k, v in grads(inner).items()}})
    assert_same(results[1], results[0], policy)


# Parts


def by_call(block: nn.Module, counter: Any) -> Any:
    return torch.compile(block, backend=counter, fullgraph=True)


def by_method(block: nn.Module, counter: Any) -> Any:
    block.compile(backend=counter, fullgraph=True)
    return block


@each_policy
@pytest.mark.parametrize(("how", "when"), [(by_call, "before"), (by_method, "before"), (by_call, "after")])
def test_compiled_parts_of_an_eager_model_have_true_gradients(policy: str, how: Any, when: str) -> None:
    skip_where_parts_run_in_pieces(policy)
    x = tokens_of()
    want = reference(Net, x)
    model = Net()
    counter = CompileCounterWithBackend("aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if when == "before":
        model.blocks[0] = how(model.blocks[0], counter)
    handle = wrap(model, optimizer, policy, loss_scale=scale_for(policy))
    if when == "after":
        model.blocks[0] = how(model.blocks[0], counter)
    for _ in range(3):
        optimizer.zero_grad()
        # Through audits too: they begin with the first backward.
        loss_of(model(x)).backward()
        assert_same(grads(model), want, policy)
        optimizer.step()
    assert counter.frame_count == 1 and not counters["graph_break"]
    assert handle.scale == (2.0**13 if policy.startswith("16") else 1.0)


@each_policy
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_compiled_parts_have_true_gradients(policy: str, reentrant: bool) -> None:
    skip_where_parts_run_in_pieces(policy)
    x = tokens_of()
    want = reference(Net, x)
    model = Net(reentrant=reentrant)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    wrap(model, policy=policy, loss_scale=scale_for(policy))
    loss_of(model(x)).backward()
    assert_same(grads(model), want, policy)
    assert not any(block.eager for block in model.blocks)


@each_policy
def test_compiled_part_with_graph_breaks_has_true_gradients(policy: str) -> None:
    x = tokens_of()
    want = reference(Net, x)
    model = Net(breaks=True)
    model.blocks[0].compile(backend="aot_eager")
    wrap(model, policy=policy, loss_scale=scale_for(policy))
    loss_of(model(x)).backward()
    assert_same(grads(model), want, policy)
    assert counters["graph_break"], "or this shows nothing"


@each_policy
def test_compiled_part_that_is_told_to_run_eagerly_has_true_gradients(policy: str) -> None:
    x = tokens_of()
    want = reference(Net, x)
    model = Net()
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)
    wrap(model, policy=policy, loss_scale=scale_for(policy))
    with torch.compiler.set_stance("force_eager"):
        loss_of(model(x)).backward()
    assert_same(grads(model), want, policy)
    assert model.blocks[0].eager


@scaled_policy
def test_overflow_in_a_compiled_part_skips_the_step(policy: str) -> None:
    skip_where_parts_run_in_pieces(policy)
    model = Net()
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.blocks[0].parameters(), lr=0.1)
    handle = wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=2.0**24))
    before = copy.deepcopy(model.state_dict())
    loss_of(model(tokens_of()), 1000.0).backward()
    for param in model.parameters():
        param.grad.nan_to_num_(0.0)
    optimizer.step()
    assert handle.step_was_skipped and handle.scale == 2.0**23
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# frozen()


@each_policy
@pytest.mark.parametrize(("part", "backend"), [(True, "aot_eager"), (False, "aot_eager"), (False, "inductor")])
def test_frozen_outputs_are_those_of_the_compiled_model(policy: str, part: bool, backend: str) -> None:
    x = tokens_of()
    model = Net()
    if part:
        model.blocks[0].compile(backend=backend, fullgraph=True)
    handle = wrap(model, policy=policy)
    call: Any = model if part else torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        loose = call(x)
        with handle.frozen():
            first, second = call(x), call(x)
            # A weight that changes is seen: nothing of it is baked into a graph.
    assert torch.equal(first, loose) and torch.equal(second, loose)
    with torch.no_grad():
        model.blocks[0].down.weight.mul_(2)
        with handle.frozen():
            assert not torch.equal(call(x), loose)


# Training steps and optimizers


@each_policy
def test_compiled_training_step_has_true_gradients(policy: str) -> None:
    """Forward, backward, step and zero_grad in one function, which dynamo takes apart."""
    x = tokens_of()
    want = reference(Net, x)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wrap(model, optimizer, policy, loss_scale=scale_for(policy))
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter)
    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(3):
        step(x)
        assert_same(grads(model), want, policy)
    assert counter.frame_count >= 1 and not any(block.eager for block in model.blocks)
    assert handle.scale == (2.0**13 if policy.startswith("16") else 1.0)


@each_policy
@pytest.mark.parametrize(
    ("kind", "when", "backend"),
    [
        ("plain", "before", "aot_eager"),
        ("foreach", "after", "aot_eager"),
        ("foreach", "after", "inductor"),
        ("fused", "before", "aot_eager"),
        ("fused", "after", "aot_eager"),
    ],
)
def test_compiled_optimizer_step_steps_and_skips(policy: str, kind: str, when: str, backend: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 4)
    model = copy.deepcopy(plain)
    options = {"lr": 0.05} if kind == "plain" else {"lr": 0.05, kind: True}
    theirs = torch.optim.AdamW(plain.parameters(), **options)
    mine = torch.optim.AdamW(model.parameters(), **options)
    if when == "before":
        mine.step = torch.compile(mine.step, backend=backend)
    handle = wrap(model, mine, policy, loss_scale=64 if policy.startswith("16") else None)
    step = mine.step if when == "before" else torch.compile(mine.step, backend=backend)
    for number in range(3):
        x = torch.randn(6, 4)
        for net, optimizer in ((plain, theirs), (model, mine)):
            optimizer.zero_grad()
            # The second backward overflows under a loss scale: float32 leaves that step out by hand.
            factor = 1e30 if number == 1 and net is model and policy.startswith("16") else 1.0
            (net(x).square().mean() * factor).backward()
        if number != 1 or not policy.startswith("16"):
            theirs.step()
        step()
    assert handle.skipped_steps == (1 if policy.startswith("16") else 0)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        # AdamW's steps have the size of the learning rate, 0.05; gradients differ by the dtype's rounding.
        assert torch.allclose(a, b, atol=0.01)
