"""What comes into a forward by other ways than as arguments has true gradients under a loss scale, or is an error."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fourfold import Found, assert_close, batch, compare, each_policy, each_scaled, grads
from test_threads import together
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import wrapprec
from wrapprec import ScaleLeakError

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

LATE = 10
"""Steps after which no audit is due any more: three were, and nothing of what they look at has changed."""


class Memory:
    """A cache of one's own: opaque to a walk through trees."""

    def __init__(self) -> None:
        self.layers: list[Slot] = [Slot(), Slot()]


class Slot:
    __slots__ = ("keys",)

    def __init__(self) -> None:
        self.keys: Tensor | None = None


class Attends(nn.Module):
    """Two layers that look back at what the cache holds."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.key = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Any:
        memory = Memory() if memory is None else memory
        for slot, query, key in zip(memory.layers, self.query, self.key, strict=True):
            new = key(x)
            slot.keys = new if slot.keys is None else torch.cat([slot.keys, new], dim=1)
            x = F.scaled_dot_product_attention(query(x), slot.keys, slot.keys) + x
        return x, memory


def warm_up(model: Any, steps: int) -> None:
    """Use the audits up; the gradients are thrown away."""
    for _ in range(steps):
        model(torch.randn(2, 3, 8))[0].square().mean().div(8).backward()
    model.zero_grad()


# Caches and objects


@each_policy
@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("cut", ["whole", "detached", "reordered"])
def test_cache_carried_from_forward_to_forward_is_true(policy: str, cut: str, late: int) -> None:
    def run(model: Any) -> Found:
        warm_up(model, late)
        memory, loss, outs = None, torch.zeros(()), {}
        for step in range(3):
            x = torch.randn(2, 3, 8)
            out, memory = model(x, memory)
            loss = loss + out.square().mean() / 8
            outs[f"out{step}"] = out
            for slot in memory.layers:
                if cut == "detached":
                    slot.keys = slot.keys.detach()
                elif cut == "reordered":
                    slot.keys = slot.keys.index_select(0, torch.tensor([1, 0]))
        loss = loss + sum(slot.keys.float().square().mean() for slot in memory.layers) / 8
        loss.backward()
        return {**grads(model), **outs}

    # Three forwards, one after the other.
    compare(Attends, run, policy, slack=2)


@each_policy
def test_objects_that_are_given_are_as_they_were_after_forward(policy: str) -> None:
    """Also after an exception, and also when the same object is given twice."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)

        def forward(self, one: Memory, other: Memory, fail: bool = False) -> Tensor:
            out: Tensor = self.body(one.layers[0].keys) + self.body(other.layers[0].keys)
            if fail:
                raise KeyError("on purpose")
            return out

    def run(model: Any) -> Found:
        memory, x = Memory(), batch(True)
        memory.layers[0].keys = x
        layers, slot = memory.layers, memory.layers[0]
        with pytest.raises(KeyError, match="on purpose"):
            model(memory, memory, fail=True)
        assert memory.layers is layers and layers[0] is slot and slot.keys is x
        model(memory, other=memory).square().mean().div(8).backward()
        assert memory.layers is layers and layers[0] is slot and slot.keys is x
        return {**grads(model), "x": x.grad}

    compare(Reads, run, policy)


@each_policy
def test_value_written_in_place_into_a_cache_is_true(policy: str) -> None:
    """A cache of fixed size, index_copy_ with gradients on: what the object holds afterwards has the graph."""

    class Fills(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(8, 8)

        def forward(self, x: Tensor, memory: Memory, at: int) -> Tensor:
            keys = memory.layers[0].keys
            assert keys is not None
            keys.index_copy_(0, torch.tensor([at]), self.key(x).to(keys.dtype))
            return keys.clone()

    def run(model: Any) -> Found:
        memory, start = Memory(), batch(True)
        memory.layers[0].keys = start * 2
        loss = torch.zeros(())
        for at in range(3):
            loss = loss + model(torch.randn(1, 8), memory, at).square().mean() / 8
        assert memory.layers[0].keys is not None
        (loss + memory.layers[0].keys.square().mean() / 8).backward()
        return {**grads(model), "start": start.grad}

    compare(Fills, run, policy)


@each_policy
@pytest.mark.parametrize("late", [0, LATE])
def test_distribution_as_output_and_as_input_again_is_true(policy: str, late: int) -> None:
    class Infers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.mean, self.spread = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor, prior: Normal | None = None) -> Any:
            h = torch.tanh(self.body(x))
            posterior = Normal(self.mean(h).float(), F.softplus(self.spread(h).float()) + 0.1)
            if prior is None:
                return h, posterior
            return kl_divergence(posterior, prior).mean(), posterior

    def run(model: Any) -> Found:
        warm_up(model, late)
        first, x = batch(True), batch(True)
        _, prior = model(first)
        loc = prior.loc
        divergence, posterior = model(x, prior)
        assert prior.loc is loc
        mean = torch.zeros(4, requires_grad=True)
        outside = Normal(mean, torch.ones(4))
        (divergence / 8 + model(x, outside)[0] / 8 + posterior.rsample().square().mean() / 8).backward()
        return {**grads(model), "first": first.grad, "x": x.grad, "outside": mean.grad}

    compare(Infers, run, policy, slack=2)


@each_scaled
def test_transformers_cache_carried_with_gradients_is_true(policy: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )

    def run(model: Any) -> Found:
        tokens, cache, loss = torch.randint(0, 32, (2, 12)), None, torch.zeros(())
        for start in range(0, 12, 4):
            piece = tokens[:, start : start + 4]
            out = model(piece, past_key_values=cache, use_cache=True, labels=piece)
            cache, loss = out.past_key_values, loss + out.loss / 32
        loss.backward()
        return grads(model)

    # Two layers with attention, three forwards.
    compare(lambda: transformers.LlamaForCausalLM(config), run, policy, slack=3)


@each_scaled
def test_object_in_use_on_two_threads_at_once_is_refused(policy: str) -> None:
    memory, x = Memory(), batch(True)
    memory.layers[0].keys = x

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)

        def forward(self, given: Memory, meanwhile: Callable[[], None] | None = None) -> Tensor:
            if meanwhile is not None:
                together(meanwhile)
            out: Tensor = self.body(given.layers[0].keys)
            return out

    model = Waits()
    wrapprec.wrap(model, policy=policy)

    def other() -> None:
        with pytest.raises(ScaleLeakError) as caught:
            model(memory)
        assert "one thread at a time" in str(caught.value) and "(6, 8)" in str(caught.value)
        assert '"" (the model itself, Waits)' in str(caught.value)

    model(memory, other).square().mean().div(8).backward()
    assert memory.layers[0].keys is x
    want = Waits()
    want.load_state_dict(model.state_dict())
    mine, x.grad = x.grad, None
    want(memory).square().mean().div(8).backward()
    assert_close({**grads(model), "x": mine}, {**grads(want), "x": x.grad}, policy)


@each_scaled
def test_carried_objects_and_graphs_are_let_go(policy: str) -> None:
    model = Attends()
    wrapprec.wrap(model, policy=policy)
    out, memory = model(torch.randn(2, 3, 8))
    out, memory = model(torch.randn(2, 3, 8), memory)
    alive = weakref.ref(memory)
    del out, memory
    gc.collect()
    assert alive() is None


# Attributes


class Keeps(nn.Module):
    """An expert that keeps an auxiliary loss in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head, self.how = nn.Linear(8, 8), nn.Linear(8, 4), how
        self.total: Any = 0.0
        self.log: list[Any] = []
        self.memory: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        h = torch.tanh(self.body(x))
        aux = h.float().square().mean()
        if self.how == "sum":
            self.total = self.total + aux
        elif self.how == "sum in place":
            self.total += aux
        elif self.how == "list":
            self.log.append(aux)
            self.total = sum(self.log)
        elif self.how == "memory":
            h = h if self.memory is None else torch.tanh(self.head.weight.new_ones(()) * h + self.memory)
            self.memory = h
            self.total = aux
        else:
            self.total = aux
        return self.head(h), 0


@each_policy
@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("how", ["sum", "sum in place", "list", "memory", "last"])
@pytest.mark.parametrize("alone", [True, False], ids=["aux alone", "with output"])
def test_loss_carried_on_a_module_over_several_forwards_is_true(policy: str, how: str, late: int, alone: bool) -> None:
    """Read for the first time when no audit is due any more, too."""

    def run(model: Any) -> Found:
        for _ in range(late):
            model(batch())[0].square().mean().div(8).backward()
            model.total, model.memory = 0.0, None
            model.log.clear()
        model.zero_grad()
        found: Found = {}
        for step in range(2):
            loss = torch.zeros(())
            for _ in range(3):
                loss = loss + model(batch())[0].square().mean() / 8
            (model.total / 8 if alone else loss + model.total / 8).backward()
            found |= {f"{k}{step}": v for k, v in grads(model).items()}
            model.total, model.memory = 0.0, None
            model.log.clear()
        return found

    compare(lambda: Keeps(how), run, policy, slack=2)


@each_policy
def test_attributes_that_forward_leaves_alone_stay_the_same_objects(policy: str) -> None:
    model: Any = Keeps("last")
    outside = torch.ones(3, requires_grad=True)
    held = {"loose": outside, "listed": [outside, {"again": outside}], "computed": outside * 2, "mine": Memory()}
    held["mine"].layers[0].keys = outside  # type: ignore[attr-defined]
    for name, value in held.items():
        setattr(model, name, value)
    model.log = [*model.parameters()]
    params = list(model.log)
    wrapprec.wrap(model, policy=policy)
    for fails in (False, False, True):
        if fails:
            with pytest.raises(TypeError):
                model(None)
        else:
            model(batch())
        assert all(getattr(model, name) is value for name, value in held.items())
        assert model.listed[0] is outside and model.listed[1]["again"] is outside
        assert model.mine.layers[0].keys is outside
        assert all(kept is param for kept, param in zip(model.log, params, strict=True))


# Weights, prompts and latents from elsewhere


class Generated(nn.Module):
    """A hypernetwork inside: F.linear with weights that another module computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.hyper = nn.Linear(8, 8), nn.Linear(3, 32)
        self.register_buffer("z", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(x)), self.hyper(self.z).view(4, 8))


@each_policy
def test_hypernetwork_inside_the_model_is_true(policy: str) -> None:
    def run(model: Any) -> Found:
        x = batch(True)
        model(x).square().mean().div(64).backward()
        return {**grads(model), "x": x.grad}

    compare(Generated, run, policy)


class Takes(nn.Module):
    """Uses a tensor that comes in one of four ways."""

    def __init__(self, capture: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.body, self.prompt, self.capture = nn.Linear(8, 8), None, capture

    def forward(self, x: Tensor, prompt: Any = None) -> tuple[Tensor, int]:
        out: Tensor = torch.tanh(self.body(x))
        for given in (prompt, self.prompt, self.capture()):
            if given is not None:
                given = given.layers[0].keys if isinstance(given, Memory) else given
                given = given[0] if isinstance(given, list) else given
                out = out * given
        return out, 0


def _source(kind: str) -> tuple[Callable[[], Tensor], nn.Module | Tensor]:
    """How the prompt is made at each step, and whose gradient tells."""
    torch.manual_seed(3)
    if kind == "module":
        hyper, z = nn.Linear(3, 8), torch.randn(3)
        return lambda: hyper(z), hyper
    leaf = nn.Parameter(torch.randn(8)) if kind == "parameter" else torch.randn(8, requires_grad=True)
    return lambda: leaf, leaf


def _found(model: nn.Module, source: nn.Module | Tensor) -> Found:
    return {**grads(model), **(grads(source) if isinstance(source, nn.Module) else {"source": source.grad})}


@each_policy
@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("kind", ["module", "parameter", "tensor"])
@pytest.mark.parametrize("way", ["argument", "object", "attribute", "attribute in a list"])
def test_prompt_from_outside_is_true(policy: str, way: str, kind: str, late: int) -> None:
    """A weight that an unwrapped module computes, a Parameter, a plain tensor: passed, or put on the model."""

    def run(model: Any) -> Found:
        make, source = _source(kind)
        warm_up(model, late)
        for _ in range(2):
            x, prompt = batch(), make()
            given: Any = prompt
            if way == "object":
                given = Memory()
                given.layers[0].keys = prompt
            if way.startswith("attribute"):
                # Not a submodule's parameter: a Parameter that is assigned would be registered.
                vars(model)["prompt"] = [prompt] if way.endswith("list") else prompt
                given = None
            model(x, given)[0].square().mean().div(64).backward()
        return _found(model, source)

    compare(Takes, run, policy)


@each_scaled
@pytest.mark.parametrize("late", [0, LATE])
def test_prompt_on_a_model_that_other_threads_train_is_refused(policy: str, late: int) -> None:
    """They would see it replaced. When they are done, it is true again."""
    model = Takes()
    wrapprec.wrap(model, policy=policy)
    plain = copy.deepcopy(model)
    wrapprec.unwrap(plain)
    prompt, x = torch.randn(8, requires_grad=True), batch()
    trained, done = threading.Event(), threading.Event()

    def train() -> None:
        warm_up(model, max(late, 1))
        trained.set()
        done.wait(20)

    def use() -> None:
        assert trained.wait(20)
        try:
            for each in (model, plain):
                vars(each)["prompt"] = prompt
            with pytest.raises(ScaleLeakError, match=r"shape \(8,\)"):
                model(x)[0].square().mean().div(8).backward()
        finally:
            done.set()

    together(train, use)
    model(x)[0].square().mean().div(8).backward()
    mine, prompt.grad = prompt.grad, None
    plain(x)[0].square().mean().div(8).backward()
    assert_close({**grads(model), "prompt": mine}, {**grads(plain), "prompt": prompt.grad}, policy)


@each_scaled
@pytest.mark.parametrize("kind", ["module", "parameter", "tensor"])
def test_prompt_captured_by_a_closure_is_refused(policy: str, kind: str) -> None:
    make, _ = _source(kind)
    model = Takes(make)
    wrapprec.wrap(model, policy=policy)
    loss = model(batch())[0].square().mean()
    with pytest.raises(ScaleLeakError) as caught:
        loss.backward()
    text = str(caught.value)
    assert "used inside forward without crossing the border" in text and "pass it as an input" in text
    assert model.body.weight.grad is None


# Hooks


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x, 0


@each_policy
@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("with_output", [True, False])
def test_perceptual_loss_by_hooks_is_true_with_leave(policy: str, late: int, with_output: bool) -> None:
    def run(model: Any) -> Found:
        warm_up(model, late)
        kept: list[Tensor] = []
        for layer in model.layers[:2]:
            layer.register_forward_hook(lambda module, args, out: kept.append(wrapprec.leave(out)))
        x = batch(True)
        out = model(x)[0]
        loss = sum((h.float() - 0.1).square().mean() for h in kept) / 8
        (loss + out.square().mean() / 8 if with_output else loss).backward()
        return {**grads(model), "x": x.grad}

    compare(Features, run, policy)


@each_scaled
@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize("pre", [True, False])
def test_perceptual_loss_by_hooks_without_leave_is_refused(
    policy: str, late: int, with_output: bool, pre: bool
) -> None:
    """Hooks that are put there later make an audit due again."""
    model = Features()
    wrapprec.wrap(model, policy=policy)
    warm_up(model, late)
    kept: list[Tensor] = []
    if pre:
        model.layers[1].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    else:
        model.layers[1].register_forward_hook(lambda module, args, out: kept.append(out))
    out = model(batch())[0]
    loss = kept[0].float().square().mean()
    with pytest.raises(ScaleLeakError, match=r"wrapprec.leave\(tensor\)"):
        (loss + out.square().mean() if with_output else loss).backward()
    assert all(p.grad is None for p in model.parameters())


def test_hooks_put_there_and_taken_away_at_each_step_do_not_pile_up_audits() -> None:
    model = Features()
    wrapprec.wrap(model, policy="16-mixed")
    warm_up(model, 4)
    schedule = model.forward.shared.schedule  # type: ignore[attr-defined]
    known = len(schedule.known)
    for _ in range(5):
        hook = model.layers[0].register_forward_hook(lambda *_: None)
        out = model(batch())[0].square().mean() / 8
        assert schedule.left == 1
        out.backward()
        hook.remove()
    assert len(schedule.known) == known and schedule.left == 0
    batch(True).register_hook(lambda grad: grad)  # a hook elsewhere
    model(batch())
    assert schedule.left == 0


# A leaf that a hook makes


class Adapted(nn.Module):
    """A frozen model with one trained layer, checkpointed or not: what PEFT makes."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(5, 8), nn.Parameter(torch.randn(8))
        self.body, self.adapter, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant
        for param in (self.embed.weight, self.position, *self.body.parameters()):
            param.requires_grad_(False)

    def block(self, h: Tensor) -> Tensor:
        return torch.tanh(self.body(h) + self.adapter(h))

    def forward(self, tokens: Tensor) -> Tensor:
        # The parent uses the leaf before any module gets it.
        h = self.embed(tokens) + self.position
        if self.reentrant is None:
            return self.block(h)
        return torch.utils.checkpoint.checkpoint(self.block, h, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@each_policy
@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_leaf_that_a_forward_hook_makes_is_true(policy: str, reentrant: bool | None, late: int) -> None:
    """transformers' enable_input_require_grads: the hook calls requires_grad_() on the embeddings."""

    def run(model: Any) -> Found:
        leaves: list[Tensor] = []

        def make_leaf(module: nn.Module, args: Any, out: Tensor) -> None:
            leaves.append(out.requires_grad_(True))

        tokens = torch.randint(0, 5, (6,))
        if late:
            model.reentrant, before = None, model.reentrant
            for _ in range(late):
                model(tokens).square().mean().div(8).backward()
            model.reentrant = before
            model.zero_grad()
        model.embed.register_forward_hook(make_leaf)
        for _ in range(2):
            model(tokens).square().mean().div(8).backward()
        assert all(leaf.is_leaf for leaf in leaves)
        return {**grads(model), **{f"leaf{i}": leaf.grad.float() for i, leaf in enumerate(leaves)}}  # type: ignore[union-attr]

    compare(lambda: Adapted(reentrant), run, policy)


@each_scaled
def test_leaf_made_inside_that_is_used_outside_too_is_refused(policy: str) -> None:
    model = Adapted(None)
    wrapprec.wrap(model, policy=policy)
    leaves: list[Tensor] = []
    model.embed.register_forward_hook(lambda module, args, out: leaves.append(out.requires_grad_(True)))
    out = model(torch.randint(0, 5, (6,)))
    with pytest.raises(ScaleLeakError):
        (out.square().mean() + leaves[0].square().mean()).backward()


@each_scaled
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_adapters_of_a_transformers_model_are_true(policy: str, reentrant: bool | None) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )

    def run(model: Any) -> Found:
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.requires_grad_(True)
        model.enable_input_require_grads()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        tokens = torch.randint(0, 32, (2, 6))
        for _ in range(5):
            model(tokens, labels=tokens, use_cache=False).loss.div(32).backward()
        return grads(model)

    compare(lambda: transformers.LlamaForCausalLM(config), run, policy, slack=2)


@each_scaled
def test_copy_of_a_model_takes_nothing_along(policy: str) -> None:
    model = Keeps("sum")
    wrapprec.wrap(model, policy=policy)
    model(batch())[0].sum().div(8).backward()
    model.total = 0.0
    twin = copy.deepcopy(model)
    plain = copy.deepcopy(twin)
    wrapprec.unwrap(plain)
    for each in (twin, plain):
        each.zero_grad()
        torch.manual_seed(1)
        (each(batch())[0].square().mean() + each.total).div(8).backward()
    assert_close(grads(twin), grads(plain), policy)
