"""Activation checkpointing of every kind: true gradients, and a recomputation in the precision of the original run."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import wrapprec
from wrapprec import LossScale

pytestmark = [
    pytest.mark.filterwarnings("ignore:float16 on a CPU"),
    # Of a reentrant checkpoint in another one, whose first run is under no_grad.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LOW = {"16-mixed": F16, "16-module": F16, "bf16-mixed": BF16, "bf16-module": BF16}
each_policy = pytest.mark.parametrize("policy", list(LOW))
each_kind = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])

# Eight rounding steps of the compute dtype in the norm of a gradient: activations, weights and gradients are rounded
# once each in a few layers. A border that is missing or doubled is off by the scale, 2**16; a block that is recomputed
# with other dropout masks by more than half.
TOLERANCE = {"16": 8 * 2**-10, "bf": 8 * 2**-7}

LESS = 64
"""What losses are divided by: their scaled gradients stay within float16 at the first scale, 2**16."""

Gradients = dict[str, "Tensor | None"]


class Drop(nn.Module):
    """Dropout whose mask is drawn in float32, so that the same seed gives the same mask in every precision."""

    def forward(self, x: Tensor) -> Tensor:
        keep = (torch.rand(x.shape) < 0.5).to(x.dtype)
        return x * keep * 2 if self.training else x


class Block(nn.Module):
    """A residual block that notes the dtypes in which it computes. It owns no parameters itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(8), Drop()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.seen: list[tuple[torch.dtype, ...]] = []

    def forward(self, x: Tensor, gain: float = 0.5) -> Tensor:
        hidden = self.up(self.norm(x))
        dropped = self.drop(F.gelu(hidden))
        # Before the last layer: a recomputation may stop when that has saved its input.
        self.seen.append((x.dtype, self.up.weight.dtype, hidden.dtype, dropped.dtype))
        return x + gain * self.down(dropped)


def through(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def each(blocks: Any, x: Tensor, reentrant: bool) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    return x


def nested(blocks: Any, x: Tensor, outer: bool, inner: bool) -> Tensor:
    return checkpoint(functools.partial(each, blocks, reentrant=inner), x, use_reentrant=outer)


def saves_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


def saves_casts(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    casts = (torch.ops.aten._to_copy.default,)
    return CheckpointPolicy.MUST_SAVE if op in casts else CheckpointPolicy.PREFER_RECOMPUTE


def saves_all(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def selective(blocks: Any, x: Tensor, saves: Any) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, saves)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return x


def to_the_end(blocks: Any, x: Tensor) -> Tensor:
    """Without early stop: the whole of each block is recomputed."""
    with set_checkpoint_early_stop(False):
        return each(blocks, x, reentrant=False)


def offloaded(blocks: Any, x: Tensor, reentrant: bool) -> Tensor:
    with save_on_cpu():
        return each(blocks, x, reentrant)


def offloading(blocks: Any, x: Tensor, reentrant: bool) -> Tensor:
    def run(x: Tensor) -> Tensor:
        with save_on_cpu():
            return through(blocks, x)

    return checkpoint(run, x, use_reentrant=reentrant)


def each_in_sequential(blocks: Any, x: Tensor, outer: bool, inner: bool) -> Tensor:
    parts = [functools.partial(checkpoint, block, use_reentrant=inner) for block in blocks]
    out: Tensor = checkpoint_sequential(parts, 2, x, use_reentrant=outer)
    return out


WAYS: dict[str, Callable[..., Tensor]] = {
    "each, reentrant": functools.partial(each, reentrant=True),
    "each": functools.partial(each, reentrant=False),
    "reentrant in reentrant": functools.partial(nested, outer=True, inner=True),
    "not in reentrant": functools.partial(nested, outer=True, inner=False),
    "reentrant in not": functools.partial(nested, outer=False, inner=True),
    "not in not": functools.partial(nested, outer=False, inner=False),
    "one function, reentrant": lambda b, x: checkpoint(functools.partial(through, b), x, use_reentrant=True),
    "one function": lambda b, x: checkpoint(functools.partial(through, b), x, use_reentrant=False),
    "sequential, reentrant": lambda b, x: checkpoint_sequential(list(b), 2, x, use_reentrant=True),
    "sequential": lambda b, x: checkpoint_sequential(list(b), 2, x, use_reentrant=False),
    "each in sequential, reentrant": functools.partial(each_in_sequential, outer=True, inner=False),
    "reentrant each in sequential": functools.partial(each_in_sequential, outer=False, inner=True),
    "selective": functools.partial(selective, saves=saves_products),
    "selective, casts": functools.partial(selective, saves=saves_casts),
    "selective, all": functools.partial(selective, saves=saves_all),
    "no early stop": to_the_end,
    "on the cpu, reentrant": functools.partial(offloaded, reentrant=True),
    "on the cpu": functools.partial(offloaded, reentrant=False),
    "with the cpu inside, reentrant": functools.partial(offloading, reentrant=True),
    "with the cpu inside": functools.partial(offloading, reentrant=False),
}


class Net(nn.Module):
    """A stem, three blocks, one of them twice, which `way` runs, and a head."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        # An addition that makes the stream float32, also under module casting: the blocks are given that.
        self.register_buffer("place", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.place
        out: Tensor = self.head(self.way([*self.blocks, self.blocks[0]], x))
        return out


def grads(model: nn.Module, **more: Tensor) -> Gradients:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {**found, **{name: x.grad for name, x in more.items()}}


def one(model: Any) -> Gradients:
    torch.manual_seed(1)
    x = torch.randn(6, 8, requires_grad=True)
    model(x).square().mean().div(LESS).backward()
    return grads(model, x=x)


def accumulates(model: Any) -> Gradients:
    torch.manual_seed(1)
    for _ in range(3):
        model(torch.randn(6, 8)).square().mean().div(3 * LESS).backward()
    return grads(model)


def two_losses(model: Any) -> Gradients:
    torch.manual_seed(1)
    x = torch.randn(6, 8, requires_grad=True)
    out = model(x)
    out.square().mean().div(LESS).backward(retain_graph=True)
    out[:, 0].mean().div(LESS).backward()
    return grads(model, x=x)


LOOPS = {"one": one, "accumulates": accumulates, "two losses": two_losses}


def assert_same(got: Gradients, want: Gradients, policy: str) -> None:
    assert got.keys() == want.keys()
    for name, true in want.items():
        mine = got[name]
        assert mine is not None and true is not None and mine.dtype == F32, name
        off = (mine - true).norm() / true.norm().clamp(min=1e-30)
        assert off <= TOLERANCE[policy[:2]], f"{name}: relative error {off:.2e}"


def compare(way: Any, loop: Callable[..., Gradients], policy: str, **options: Any) -> Net:
    """Gradients against those of the plain model that computes without checkpoints."""
    want = loop(Net(through))
    model = Net(way)
    wrapprec.wrap(model, policy=policy, **options)
    assert_same(loop(model), want, policy)
    return model


@each_policy
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loop", LOOPS)
def test_checkpoints_of_every_kind_have_true_gradients(policy: str, way: str, loop: str) -> None:
    if loop == "two losses" and way.startswith("selective"):
        pytest.skip("torch: only one backward through a selective checkpoint")
    model = compare(WAYS[way], LOOPS[loop], policy)
    seen = [dtypes for block in model.blocks for dtypes in block.seen]
    assert set(seen) == {(F32, LOW[policy] if "module" in policy else F32, LOW[policy], LOW[policy])}
    # Four uses of blocks in each forward; what save_on_cpu has saved inside need not be computed again.
    assert len(seen) > 4 * (3 if loop == "accumulates" else 1) or way == "with the cpu inside"


@each_policy
@pytest.mark.parametrize(
    "way", ["each, reentrant", "each", "one function, reentrant", "one function", "not in reentrant"]
)
def test_float32_block_is_recomputed_in_float32(policy: str, way: str) -> None:
    model = compare(WAYS[way], one, policy, rules=[("blocks.1", "float32")])
    low, island = set(model.blocks[2].seen), set(model.blocks[1].seen)
    assert len(low) == 1 and island == {(F32,) * 4} and low != island


@each_policy
@each_kind
def test_low_block_of_a_float32_model_is_recomputed_in_low_precision(policy: str, reentrant: bool) -> None:
    way = functools.partial(each, reentrant=reentrant)
    want = one(Net(through))
    model = Net(way)
    wrapprec.wrap(model, policy="32-true", rules=[("blocks.1", policy)])
    assert_same(one(model), want, policy)
    assert {seen[2] for seen in model.blocks[1].seen} == {LOW[policy]}
    assert set(model.blocks[2].seen) == {(F32,) * 4}


@each_policy
@each_kind
@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
def test_float32_context_holds_in_the_recomputation(policy: str, reentrant: bool, around: bool) -> None:
    seen: list[torch.dtype] = []

    def product(x: Tensor) -> Tensor:
        out = x @ x.mT
        seen.append(out.dtype)
        return (out @ x).tanh()

    def way(blocks: Any, x: Tensor) -> Tensor:
        x = blocks[0](x)
        if around:
            with wrapprec.float32():
                x = checkpoint(product, x, use_reentrant=reentrant)
        else:
            x = checkpoint(wrapprec.float32()(product), x, use_reentrant=reentrant)
        return through(blocks[1:], x)

    def plain(blocks: Any, x: Tensor) -> Tensor:
        return through(blocks[1:], product(blocks[0](x)))

    want = one(Net(plain))
    seen.clear()
    model = Net(way)
    wrapprec.wrap(model, policy=policy)
    assert_same(one(model), want, policy)
    assert seen == [F32, F32]


class Direct(nn.Module):
    """Checkpoints a method that uses the module's own weights, by no other module's forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.dtypes: list[torch.dtype] = []

    def part(self, x: Tensor) -> Tensor:
        hidden = F.linear(torch.tanh(x), self.first.weight, self.first.bias)
        self.dtypes.append(hidden.dtype)
        return self.gain * self.last(hidden.tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.first(x))
        for _ in range(2):
            x = x + (self.part(x) if self.how == "plain" else checkpoint(self.part, x, use_reentrant=self.how == "re"))
        return x


@each_policy
@pytest.mark.parametrize("how", ["re", "not"])
@pytest.mark.parametrize("loop", LOOPS)
def test_weights_used_directly_in_a_checkpointed_function_get_true_gradients(policy: str, how: str, loop: str) -> None:
    want = LOOPS[loop](Direct("plain"))
    model = Direct(how)
    wrapprec.wrap(model, policy=policy)
    assert_same(LOOPS[loop](model), want, policy)
    assert set(model.dtypes) == {LOW[policy]}


class Mended(nn.Module):
    """Checkpoints its own code, in which dtypes mix or float32 is needed: it is mended in both runs or in neither."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what, self.how = what, how
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.randn(5, 5) / 3)
        self.register_buffer("place", torch.rand(6, 5) + 0.5)
        self.dtypes: list[torch.dtype] = []

    def part(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.down(torch.tanh(self.up(x)))
        self.dtypes.append(h.dtype)
        if self.what == "loss":
            return F.cross_entropy(h, labels, reduction="none")
        if self.what == "product with a buffer":
            return torch.matmul(h * self.place, self.weight)
        if self.what == "raised":
            return F.linear(h.float(), self.weight)
        return torch.zeros(5, 5).index_add_(0, labels, torch.matmul(h, self.weight))

    def forward(self, x: Tensor) -> Tensor:
        labels = torch.tensor([0, 1, 2, 3, 4, 0])
        if self.how == "plain":
            return self.part(x, labels)
        return checkpoint(self.part, x, labels, use_reentrant=self.how == "reentrant")  # type: ignore[no-any-return]


class Fills(Mended):
    """The number past the range is in a method that forward hands on and does not call."""

    def part(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.down(torch.tanh(self.up(x)))
        self.dtypes.append(h.dtype)
        scores = (h @ h.mT).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
        return scores.softmax(-1) @ h


@each_policy
@pytest.mark.parametrize("how", ["reentrant", "not"])
@pytest.mark.parametrize("what", ["loss", "product with a buffer", "raised", "sum at indices", "fill"])
def test_own_code_that_is_mended_is_mended_again_in_the_recomputation(policy: str, how: str, what: str) -> None:
    kind = Fills if what == "fill" else Mended
    want = one(kind(what, "plain"))
    model = kind(what, how)
    wrapprec.wrap(model, policy=policy)
    got = one(model)
    assert {name for name, grad in got.items() if grad is None} == ({"weight"} if what in ("loss", "fill") else set())
    assert_same(*({name: grad for name, grad in g.items() if grad is not None} for g in (got, want)), policy)
    assert model.dtypes == [F32 if what == "fill" else LOW[policy]] * 2
    assert not torch.overrides._get_current_function_mode_stack()


class Recurrent(nn.Module):
    """A recurrent network under a checkpoint: its list of flat weights is lent again, too."""

    def __init__(self, kind: str, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(16, 4)
        self.net = getattr(nn, kind)(8, 8, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)[:, None]
        out = self.net(x) if self.how == "plain" else checkpoint(self.net, x, use_reentrant=self.how == "reentrant")
        return self.head(out[0])  # type: ignore[no-any-return]


@each_policy
@pytest.mark.parametrize("how", ["reentrant", "not"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_networks_in_checkpoints_have_true_gradients(policy: str, how: str, kind: str) -> None:
    want = one(Recurrent(kind, "plain"))
    model = Recurrent(kind, how)
    wrapprec.wrap(model, policy=policy)
    assert_same(one(model), want, policy)


@each_policy
@each_kind
def test_plain_tensor_on_the_module_used_in_a_checkpointed_function_gets_its_true_gradient(
    policy: str, reentrant: bool
) -> None:
    class Prompted(Direct):
        def __init__(self, how: str) -> None:
            super().__init__(how)
            self.prompt = torch.randn(8).requires_grad_()

        def part(self, x: Tensor) -> Tensor:
            return super().part(x) + self.prompt.to(x.dtype)

    results = []
    for how in ("plain", "re" if reentrant else "not"):
        model = Prompted(how)
        if how != "plain":
            wrapprec.wrap(model, policy=policy)
        results.append({**one(model), "prompt": model.prompt.grad})
    assert_same(results[1], results[0], policy)


@each_policy
@each_kind
def test_operands_that_are_mended_in_the_first_run_are_mended_again(policy: str, reentrant: bool) -> None:
    class Mixes(nn.Module):
        """Multiplies what a float32 buffer has made float32 with what is low."""

        def __init__(self, how: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.how = how
            self.first = nn.Linear(8, 8)
            self.register_buffer("mask", torch.rand(8))

        def part(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return torch.matmul(hidden * self.mask, hidden.mT) @ hidden

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return x + (self.part(x) if self.how == "plain" else checkpoint(self.part, x, use_reentrant=reentrant))

    want = one(Mixes("plain"))
    model = Mixes("checkpointed")
    wrapprec.wrap(model, policy=policy)
    assert_same(one(model), want, policy)


@each_policy
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_whole_model_in_nested_checkpoints_has_true_gradients(policy: str, outer: bool, inner: bool) -> None:
    dtypes: list[torch.dtype] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        dtypes.append(out.dtype)
        return F.softplus(out).square().div(LESS)

    def whole(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(functools.partial(loss, model), x, use_reentrant=inner)

    def run(model: nn.Module, checkpointed: bool) -> Gradients:
        torch.manual_seed(1)
        x = torch.randn(6, 8, requires_grad=True)
        function = functools.partial(whole if checkpointed else loss, model)
        out = checkpoint(function, x, use_reentrant=outer) if checkpointed else function(x)
        out.mean().backward()
        return grads(model, x=x)

    want = run(Net(through), False)
    model = Net(functools.partial(each, reentrant=False))
    wrapprec.wrap(model, policy=policy)
    assert_same(run(model, True), want, policy)
    assert len(dtypes) >= 3 and set(dtypes) == {F32}


@each_policy
@each_kind
def test_second_wrapped_model_in_a_checkpoint_of_the_first_is_recomputed_too(policy: str, reentrant: bool) -> None:
    class Two(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(8, 8), [other]

        def part(self, x: Tensor) -> Tensor:
            return self.layer(self.other[0](self.layer(x)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return self.part(x) if reentrant is None else checkpoint(self.part, x, use_reentrant=reentrant)

    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        model = Two(other)
        if wrapped:
            wrapprec.wrap([model, other], policy=policy, loss_scale=64 if policy.startswith("16") else None)
        torch.manual_seed(1)
        x = torch.randn(6, 8, requires_grad=True)
        model(x).square().mean().div(LESS).backward()
        results.append({**grads(model, x=x), **{f"other.{k}": v for k, v in grads(other).items()}})
    assert_same(results[1], results[0], policy)


@each_policy
@each_kind
def test_dropout_of_torch_draws_the_same_masks_again(policy: str, reentrant: bool) -> None:
    """Against the wrapped model without checkpoints: masks of another dtype are others even from one seed."""

    def dropped(blocks: Any, x: Tensor) -> Tensor:
        return F.dropout(through(blocks, F.dropout(x, 0.5)), 0.5)

    def way(blocks: Any, x: Tensor) -> Tensor:
        return checkpoint(functools.partial(dropped, blocks), x, use_reentrant=reentrant)

    results = []
    for run in (dropped, way):
        model = Net(run)
        wrapprec.wrap(model, policy=policy)
        results.append(accumulates(model))
    # The same operations on the same numbers, gradients of a block's two uses summed in another order.
    for name, grad in results[0].items():
        assert torch.allclose(grad, results[1][name], rtol=0.02, atol=0.02 * float(grad.abs().max())), name


class Foreign(torch.autograd.Function):
    """A reentrant checkpoint that is not torch's, as libraries bring along."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


@each_policy
def test_checkpoint_of_another_library_has_true_gradients(policy: str) -> None:
    class Still(nn.Module):
        """Draws no numbers: this checkpoint does not preserve the generator."""

        def __init__(self, foreign: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.foreign = foreign
            self.stem, self.block = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return Foreign.apply(self.block, x) if self.foreign else self.block(x)

    want = two_losses(Still(False))
    model = Still(True)
    wrapprec.wrap(model, policy=policy)
    assert_same(two_losses(model), want, policy)


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
@each_kind
def test_overflow_in_a_checkpointed_block_skips_the_step(policy: str, reentrant: bool) -> None:
    model = Net(functools.partial(each, reentrant=reentrant))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=2.0**24))
    before = copy.deepcopy(model.state_dict())
    one(model)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()
    assert handle.step_was_skipped and handle.scale == 2.0**23
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@each_kind
def test_names_of_torch_are_replaced_only_while_a_forward_runs(reentrant: bool) -> None:
    from torch.utils import checkpoint as module

    before = dict(vars(module))
    inside: list[dict[str, Any]] = []

    def way(blocks: Any, x: Tensor) -> Tensor:
        inside.append(dict(vars(module)))
        if len(inside) == 3:
            raise KeyError("on purpose")
        return each(blocks, x, reentrant)

    model = Net(way)
    wrapprec.wrap(model, policy="16-module")
    model(torch.randn(2, 8)).sum().div(LESS).backward()
    assert inside[0] != before and dict(vars(module)) == before
    with torch.no_grad():
        model(torch.randn(2, 8))
    with pytest.raises(KeyError, match="on purpose"):
        model(torch.randn(2, 8))
    assert dict(vars(module)) == before
    assert type(model.stem._parameters) is dict


def test_graph_does_not_keep_what_was_lent_to_the_first_run() -> None:
    lent = []

    class Keeps(Block):
        def forward(self, x: Tensor, gain: float = 0.5) -> Tensor:
            lent.append(weakref.ref(self.up.weight))
            return super().forward(x, gain)

    model = Net(functools.partial(each, reentrant=True))
    model.blocks[0] = Keeps()
    wrapprec.wrap(model, policy="bf16-module")
    out = model(torch.randn(2, 8))
    gc.collect()
    # With gradients on, a plain forward's graph needs them; under a reentrant checkpoint nothing does.
    assert lent and all(ref() is None for ref in lent)
    out.sum().backward()


# Hugging Face


@each_policy
@each_kind
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_of_hugging_face_has_true_gradients(policy: str, reentrant: bool, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 32, "use_cache": False}
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=16, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **small
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **small
        )
    tokens = torch.randint(32, (2, 7))
    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).train()
        if wrapped:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            wrapprec.wrap(model, policy=policy)
        calls: list[torch.dtype] = []
        layer = (model.transformer.h if family == "gpt2" else model.model.layers)[0]
        layer.mlp.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[0].dtype))
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.div(LESS).backward()
        results.append(grads(model))
    assert len(calls) == 4 and len(set(calls)) == 1, "run, and run again, in one precision"
    assert_same(results[1], results[0], policy)


class Given:
    """An opaque object that holds a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class TakesObject(nn.Module):
    """Hands an object that it was given to a checkpointed function, as an argument or by a closure."""

    def __init__(self, reentrant: bool, closure: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reentrant, self.closure = reentrant, closure

    def block(self, x: Tensor, given: Given) -> Tensor:
        return self.second(x) * given.tensor

    def forward(self, x: Tensor, given: Given) -> Tensor:
        hidden = self.first(x).tanh()
        if self.closure:
            out = checkpoint(lambda h: self.block(h, given), hidden, use_reentrant=self.reentrant)
        else:
            out = checkpoint(self.block, hidden, given, use_reentrant=self.reentrant)
        assert isinstance(out, Tensor)
        return out


@each_policy
@each_kind
@pytest.mark.parametrize("closure", [False, True])
def test_tensors_in_an_object_that_a_checkpoint_uses_get_true_gradients(
    policy: str, reentrant: bool, closure: bool
) -> None:
    def run(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(1)
        leaf = torch.randn(6, 8, requires_grad=True)
        given = Given(leaf)
        (model(torch.randn(6, 8), given).square().mean() / LESS).backward()
        assert given.tensor is leaf
        found = {name: p.grad for name, p in model.named_parameters()} | {"leaf": leaf.grad}
        assert all(grad is not None for grad in found.values())
        return found

    torch.manual_seed(0)
    model = TakesObject(reentrant, closure)
    want = run(copy.deepcopy(model))
    wrapprec.wrap(model, policy=policy)
    for name, grad in run(model).items():
        assert (grad - want[name]).norm() <= TOLERANCE[policy[:2]] * want[name].norm(), name


class MixesInCheckpoint(nn.Module):
    """A checkpointed method with a product that module casting has to mend."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(6, 6).tril() / 6)
        self.reentrant = reentrant

    def block(self, x: Tensor) -> Tensor:
        return (x @ x.T * self.mask) @ x

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.block, self.linear(x), use_reentrant=self.reentrant)
        assert isinstance(out, Tensor)
        return out


@each_policy
@each_kind
def test_operations_that_are_mended_are_mended_in_the_recomputation(policy: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = MixesInCheckpoint(reentrant), torch.randn(6, 8)
    plain = copy.deepcopy(model)
    plain(x).square().mean().div(LESS).backward()
    wrapprec.wrap(model, policy=policy)
    model(x).square().mean().div(LESS).backward()
    assert torch._C._len_torch_function_stack() == 0
    for mine, true in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and true.grad is not None
        assert (mine.grad - true.grad).norm() <= TOLERANCE[policy[:2]] * true.grad.norm()


class ClosesOver(nn.Module):
    """Its checkpointed function uses a leaf that nothing tells of."""

    def __init__(self, leaf: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.hidden = lambda: leaf

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(lambda h: h * self.hidden(), self.linear(x), use_reentrant=True)
        assert isinstance(out, Tensor)
        return out


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_leak_within_a_reentrant_checkpoint_is_an_error_before_a_gradient_is_wrong(policy: str) -> None:
    leaf = torch.randn(6, 8, requires_grad=True)
    model = ClosesOver(leaf)
    wrapprec.wrap(model, policy=policy)
    with pytest.raises(wrapprec.ScaleLeakError, match=r"a tensor of shape \(6, 8\).* used inside forward"):
        model(torch.randn(6, 8)).square().mean().backward()
    assert leaf.grad is None
