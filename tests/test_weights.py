"""Weights that are not plain: shared, computed from others, given from outside, in containers, not there yet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sidebyside import LOW, Results, assert_same, compare, each_f16_policy, each_module_policy, each_policy, grads, seen
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import wrapprec
from wrapprec.errors import DtypeMismatchError, PolicyError

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


def batch(requires_grad: bool = True) -> Tensor:
    return torch.randn(6, 8, requires_grad=requires_grad)


def twice(model: nn.Module) -> Results:
    """Two forwards and backwards that accumulate, then one in eval."""
    for _ in range(2):
        x = batch()
        model(x).square().mean().backward()
    model.eval()
    with torch.no_grad():
        out = model(batch(False))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {**grads(model), "x": x.grad, "out": out, **buffers}


# Tied weights


class Tied(nn.Module):
    """A language model whose output layer is its embedding, by module attribute or by use of the weight."""

    def __init__(self, by_use: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = None if by_use else nn.Linear(8, 12, bias=False)
        if self.head is not None:
            self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.emb(tokens)))
        return F.linear(hidden, self.emb.weight) if self.head is None else self.head(hidden)


@each_policy
@pytest.mark.parametrize("by_use", [True, False])
def test_tied_weights_get_the_sum_of_both_gradients(policy: str, by_use: bool) -> None:
    def run(model: nn.Module) -> Results:
        tokens = torch.randint(12, (4, 6))
        out = model(tokens)
        F.cross_entropy(out.flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        return {**grads(model), "out": out.detach()}

    compare(run, policy, lambda: Tied(by_use))


# Weights that are computed from others


def hooked_weight_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.weight_norm(layer)  # type: ignore[no-any-return]


def hooked_spectral_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.spectral_norm(layer, n_power_iterations=2)


def hooked_prune(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", amount=0.5)
    return prune.random_unstructured(layer, "weight", amount=0.3)  # type: ignore[no-any-return]


class EqualLR:
    """The equalised learning rate of many StyleGAN programs: a hook of the user's own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        weight = getattr(module, self.name + "_orig")
        setattr(module, self.name, weight * (2 / weight[0].numel()) ** 0.5)


def hooked_by_the_user(layer: nn.Module) -> nn.Module:
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.register_forward_pre_hook(EqualLR("weight"))
    return layer


KINDS: list[Callable[[nn.Module], nn.Module]] = [
    hooked_weight_norm,
    hooked_spectral_norm,
    hooked_prune,
    hooked_by_the_user,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.__module__.rpartition('.')[2]}.{k.__name__}")


@each_policy
@each_kind
def test_computed_weight_of_an_inner_module_is_true(policy: str, kind: Any) -> None:
    compare(twice, policy, lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), kind(nn.Linear(8, 4))), slack=2)


@each_policy
@each_kind
def test_computed_weight_of_the_wrapped_module_itself_is_true(policy: str, kind: Any) -> None:
    compare(twice, policy, lambda: kind(nn.Linear(8, 4)), slack=2)


@each_policy
@each_kind
def test_computed_weight_of_a_module_that_is_called_directly_is_true(policy: str, kind: Any) -> None:
    def run(model: nn.Module) -> Results:
        x = batch()
        (model[1](x).square().mean() + model(x).square().mean()).backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, lambda: nn.Sequential(nn.Tanh(), kind(nn.Linear(8, 4))), slack=2)


@each_module_policy
@pytest.mark.parametrize("inner", [True, False])
@each_kind
def test_computed_weight_is_cast_to_the_compute_dtype(policy: str, kind: Any, inner: bool) -> None:
    layer = nn.Linear(8, 4)
    found = seen(layer)
    kind(layer)
    model = nn.Sequential(layer) if inner else layer
    wrapprec.wrap(model, policy=policy)
    for _ in range(2):
        model(batch())
    assert found == 2 * [LOW[policy[:2]]]


@each_policy
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("kind", [hooked_spectral_norm, parametrizations.spectral_norm])
def test_power_iteration_runs_on_the_float32_weights(policy: str, kind: Any, inner: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(kind(nn.Linear(8, 8)), nn.Tanh())
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy)
    x = batch(False)
    for _ in range(3):
        for model in (plain, mine):
            (model if inner else model[0])(x).square().mean().backward()
    vectors = dict(mine.named_buffers())
    assert len(vectors) == 2
    for name, true in plain.named_buffers():
        # The very same operations on the very same numbers: on bfloat16 weights they would differ by 1e-3.
        assert vectors[name].dtype == torch.float32 and torch.equal(vectors[name], true), name


@each_policy
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("kind", [hooked_weight_norm, hooked_spectral_norm, hooked_prune])
def test_computed_weight_is_float32_with_a_true_graph_after_forward(policy: str, kind: Any, inner: bool) -> None:
    def run(model: nn.Module) -> Results:
        (model if inner else model[0])(batch())
        weight = model[0].weight
        weight.square().mean().backward()
        return {"weight": weight.detach(), **grads(model)}

    compare(run, policy, lambda: nn.Sequential(kind(nn.Linear(8, 4))))


@each_policy
@pytest.mark.parametrize("kind", [hooked_weight_norm, hooked_prune])
def test_computed_weights_of_a_recurrent_net_are_true(policy: str, kind: Any) -> None:
    def make() -> nn.Module:
        lstm = nn.LSTM(8, 8, batch_first=True)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            if kind is hooked_prune:
                prune.random_unstructured(lstm, name, amount=0.3)
            else:
                torch.nn.utils.weight_norm(lstm, name)
        return nn.ModuleDict({"rnn": lstm})

    def run(model: Any) -> Results:
        x = torch.randn(2, 3, 8, requires_grad=True)
        for _ in range(2):
            out, _ = model["rnn"](x)
            out.square().mean().backward()
        return {**grads(model), "x": x.grad, "out": out.detach()}

    compare(run, policy, make, slack=2)


@each_policy
@each_kind
def test_computed_weight_in_a_checkpoint_is_true(policy: str, kind: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = kind(nn.Linear(8, 8)), nn.Linear(8, 4)

        def forward(self, x: Tensor, reentrant: bool) -> Tensor:
            return self.second(torch.tanh(checkpoint(self.first, x, use_reentrant=reentrant)))

    def run(model: nn.Module) -> Results:
        x = batch()
        for reentrant in (True, False):
            model(x, reentrant).square().mean().backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, Checkpointed, slack=2)


# Dynamo's own: it makes a Function to trace one, and asks every tensor that it meets for its gradient.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@each_policy
@pytest.mark.parametrize("inner", [True, False])
def test_computed_weight_in_a_compiled_model_is_true(policy: str, inner: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = hooked_spectral_norm(nn.Linear(8, 8))
    plain = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 4)) if inner else layer
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy)
    results = []
    for model, call in ((plain, plain), (mine, torch.compile(mine, backend="aot_eager", fullgraph=True))):
        torch.manual_seed(2)
        for _ in range(2):
            x = batch()
            call(x).square().mean().backward()
        results.append({**grads(model), "x": x.grad, **{n: b.clone() for n, b in model.named_buffers()}})
    assert_same(results[1], results[0], policy, slack=2)


@each_policy
def test_pruning_in_the_middle_of_training_is_true(policy: str) -> None:
    def run(model: nn.Module) -> Results:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        if wrapprec.handle_of(model) is not None:
            wrapprec.handle_of(model).attach(optimizer)
        pruned = [(model[0], "weight"), (model[2], "weight")]
        for step in range(6):
            if step == 2:
                prune.global_unstructured(pruned, prune.L1Unstructured, amount=0.4)
            if step == 4:
                prune.remove(*pruned[0])
            optimizer.zero_grad()
            x = batch(False)
            F.mse_loss(model(x), x[:, :4]).backward()
            if step == 3:
                got = grads(model)
            optimizer.step()
        return {**got, "one": model[0].weight.detach(), "two": model[2].weight.detach()}

    compare(run, policy, lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), slack=2)


@each_policy
def test_overflow_in_a_computed_weight_skips_the_step_though_clipping_hid_it(policy: str) -> None:
    if not policy.startswith("16"):
        pytest.skip("bfloat16 needs no loss scale")
    model = hooked_weight_norm(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = wrapprec.wrap(model, optimizer, policy)
    before = copy.deepcopy(model.state_dict())
    (1e4 * model(batch(False))).square().sum().backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    for p in model.parameters():
        p.grad.nan_to_num_()
    optimizer.step()
    assert handle.step_was_skipped and handle.scale < 65536
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def secretly_doubled() -> nn.Module:
    """A linear layer whose weight a plain function computes before forward: nothing tells of it."""
    model = nn.Linear(8, 4)
    model.register_parameter("secret", model._parameters.pop("weight"))
    model.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.secret * 2))
    return model


def test_weight_computed_by_a_plain_function_crosses_the_border_as_any_attribute_does() -> None:
    compare(lambda model: (model(batch()).square().mean().backward(), grads(model))[1], "16-mixed", secretly_doubled)


def test_weight_computed_by_a_plain_function_is_refused_under_module_casting() -> None:
    model = secretly_doubled()
    wrapprec.wrap(model, policy="16-module")
    with pytest.raises(DtypeMismatchError) as error:
        model(batch()).square().mean().backward()
    text = str(error.value)
    assert "Expected" in text and "Received: " in text and "Remedy: " in text and "(model)" in text
    assert all(p.grad is None for p in model.parameters())


@each_policy
@each_kind
def test_frozen_weights_and_unwrap_leave_a_computed_weight_as_it_was(policy: str, kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(nn.Linear(8, 4))).eval()
    x = batch(False)
    want = model(x)
    handle = wrapprec.wrap(model, policy=policy)
    with torch.no_grad():
        live = model(x)
    with handle.frozen():
        assert torch.equal(model(x), live)
        assert torch.equal(model(x), live)
    assert model[0].weight.dtype == torch.float32
    assert_same({"out": live}, {"out": want.detach()}, policy)
    handle.unwrap()
    assert torch.equal(model(x), want)


# Parametrisations, more of them


class Masked(nn.Module):
    """A mask as a parametrisation."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class LowRank(nn.Module):
    """A parametrisation with parameters of its own, as LoRA does it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Parameter(torch.randn(4, 2) / 8)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down.weight


@each_policy
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("of", [lambda: Masked((torch.rand(4, 8) > 0.4).float()), LowRank], ids=["mask", "low rank"])
def test_parametrisations_of_the_user_are_true(policy: str, of: Any, inner: bool) -> None:
    def make() -> nn.Module:
        layer = nn.Linear(8, 4)
        parametrize.register_parametrization(layer, "weight", of())
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), layer) if inner else layer

    compare(twice, policy, make, slack=2)


@each_policy
@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_weight_read_outside_forward_is_true(policy: str, kind: Any) -> None:
    def run(model: nn.Module) -> Results:
        x = batch(False)
        loss = model(x).square().mean() + model[0].weight.square().mean()
        assert model[0].weight.dtype == torch.float32
        loss.backward()
        return {**grads(model), "weight": model[0].weight.detach()}

    compare(run, policy, lambda: nn.Sequential(kind(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 4)), slack=2)


@each_policy
@pytest.mark.parametrize("scope_first", [True, False])
@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_cached_parametrisations_are_true_inside_and_outside_forward(policy: str, kind: Any, scope_first: bool) -> None:
    def run(model: nn.Module) -> Results:
        x = batch()
        for _ in range(2):
            with parametrize.cached():
                if scope_first:
                    loss = model(x).square().mean() + model[0].weight.square().mean()
                else:
                    loss = model[0].weight.square().mean() + model(x).square().mean()
                loss = loss + model[0](x).square().mean() + model(x).abs().mean()
                assert model[0].weight.dtype == torch.float32
            loss.div(4).backward()
        return {**grads(model), "x": x.grad}

    def make() -> nn.Module:
        model = nn.Sequential(kind(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 4))
        model(batch())
        # In training a power iteration is made by each read that finds no cached value: more of them when wrapped.
        return model.eval()

    compare(run, policy, make, slack=2)


@each_policy
def test_cached_parametrisation_is_computed_once_for_several_forwards(policy: str) -> None:
    calls: list[int] = []
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    wrapprec.wrap(model, policy=policy)
    model[0].parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    with parametrize.cached():
        model(batch())
        model(batch())
    assert len(calls) == 1
    model(batch())
    assert len(calls) == 2 and not parametrize._cache


# Given tensors


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


@each_policy
def test_functional_call_uses_given_leaves_and_their_gradients_are_true(policy: str) -> None:
    def run(model: nn.Module) -> Results:
        given = {name: torch.randn_like(p).div(3).requires_grad_() for name, p in model.named_parameters()}
        x = batch()
        for _ in range(2):
            out = functional_call(model, given, (x,))
            out.square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        return {**{name: t.grad for name, t in given.items()}, "x": x.grad, "out": out.detach()}

    compare(run, policy, net)


@each_policy
@pytest.mark.parametrize("wrapped_too", [True, False])
def test_functional_call_with_the_weights_of_a_hypernetwork_is_true(policy: str, wrapped_too: bool) -> None:
    sizes = {"0.weight": (8, 8), "0.bias": (8,), "2.weight": (4, 8), "2.bias": (4,)}
    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        main, hyper = net(), nn.Linear(3, sum(torch.Size(s).numel() for s in sizes.values()))
        if wrapped:
            wrapprec.wrap([main, hyper] if wrapped_too else main, policy=policy)
        torch.manual_seed(1)
        x, z = batch(), torch.randn(3, requires_grad=True)
        for _ in range(2):
            flat = hyper(z).split([torch.Size(s).numel() for s in sizes.values()])
            given = {name: part.view(size) for (name, size), part in zip(sizes.items(), flat, strict=True)}
            functional_call(main, given, (x,)).square().mean().div(16).backward()
        results.append({**grads(hyper), "x": x.grad, "z": z.grad})
    assert_same(results[1], results[0], policy, slack=2)


class Hyper(nn.Module):
    """The weights of one part come from another, inside one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper, self.main = nn.Linear(3, 8 * 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return functional_call(self.main, {"weight": self.hyper(z).view(4, 8)}, (x,))


@each_policy
def test_weights_of_a_hypernetwork_inside_forward_are_true(policy: str) -> None:
    def run(model: nn.Module) -> Results:
        x, z = batch(), torch.randn(3, requires_grad=True)
        for _ in range(2):
            model(x, z).square().mean().div(16).backward()
        return {**grads(model), "x": x.grad, "z": z.grad}

    compare(run, policy, Hyper)


@each_policy
def test_inner_step_of_maml_is_true(policy: str) -> None:
    def run(model: nn.Module) -> Results:
        fast = dict(model.named_parameters())
        x, y = batch(), torch.randn(6, 4)
        for _ in range(2):
            loss = F.mse_loss(functional_call(model, fast, (x,)), y)
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: p - 0.2 * g for (name, p), g in zip(fast.items(), slopes, strict=True)}
        F.mse_loss(functional_call(model, fast, (x,)), y).backward()
        return {**grads(model), "x": x.grad, "fast": fast["0.weight"].detach()}

    compare(run, policy, net, slack=4)


@each_f16_policy
def test_overflow_under_a_hypernetwork_skips_the_step_of_its_optimizer(policy: str) -> None:
    main, hyper = nn.Linear(8, 4), nn.Linear(3, 8 * 4)
    optimizer = torch.optim.SGD(hyper.parameters(), lr=0.1)
    with pytest.warns(wrapprec.WrapprecWarning, match="no wrapped model owns"):
        handle = wrapprec.wrap(main, optimizer, policy)
    before = copy.deepcopy(hyper.state_dict())
    x, z = batch(False), torch.randn(3)
    for factor in (1e5, 1e-2):
        optimizer.zero_grad()
        given = {"weight": hyper(z).view(4, 8)}
        functional_call(main, given, (x,)).mul(factor).square().mean().backward()
        optimizer.step()
        assert handle.step_was_skipped == (factor > 1)
        assert all(torch.equal(before[n], p) for n, p in hyper.named_parameters()) == (factor > 1)
    assert handle.scale == 32768


# Containers and weights that a parent uses


class Containers(nn.Module):
    """A ParameterList, a ParameterDict, a parameter of its own and one of a child's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(2)])
        self.named = nn.ParameterDict({"out": torch.randn(8, 4) / 3, "bias": torch.zeros(4)})
        self.scale = nn.Parameter(torch.ones(8))
        self.child = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.layers:
            x = torch.tanh(x @ weight)
        x = F.linear(x * self.scale, self.child.weight)
        return x @ self.named["out"] + self.named["bias"]


@each_policy
def test_parameters_in_containers_and_of_children_are_true(policy: str) -> None:
    compare(twice, policy, Containers, slack=2)


@each_policy
def test_weight_of_a_child_that_a_rule_keeps_in_float32_works_or_is_refused(policy: str) -> None:
    def run(model: nn.Module) -> Results:
        model(torch.randint(12, (4, 6))).square().mean().div(16).backward()
        return grads(model)

    if policy.endswith("mixed"):
        compare(run, policy, lambda: Tied(by_use=True), rules=[("emb", "float32")])
        return
    model = Tied(by_use=True)
    wrapprec.wrap(model, policy=policy, rules=[("emb", "float32")])
    with pytest.raises(DtypeMismatchError) as error:
        run(model)
    text = str(error.value)
    assert "Received: " in text and "(model)" in text and "float32" in text and "rule" in text.lower()


# Embeddings that renormalise their weight


@each_policy
@pytest.mark.parametrize("bag", [False, True])
def test_embedding_renormalises_its_weight_in_float32(policy: str, bag: bool) -> None:
    def make() -> nn.Module:
        kind = nn.EmbeddingBag if bag else nn.Embedding
        return nn.Sequential(kind(12, 8, max_norm=0.7), nn.Linear(8, 4))

    def run(model: nn.Module) -> Results:
        tokens = torch.randint(9, (4, 6))
        for _ in range(2):
            out = model(tokens)
            out.square().mean().backward()
        return {**grads(model), "table": model[0].weight.detach().clone(), "out": out.detach()}

    got, _ = compare(run, policy, make)
    norms = got["table"].norm(dim=1)
    assert norms[:9].max() < 0.701 and norms[9:].min() > 0.8


@each_module_policy
def test_embedding_that_renormalises_hands_on_the_compute_dtype(policy: str) -> None:
    model = nn.Sequential(nn.Embedding(4, 8, max_norm=0.7), nn.Identity())
    found: list[torch.dtype] = []
    model[1].register_forward_hook(lambda module, args, out: found.append(args[0].dtype))
    wrapprec.wrap(model, policy=policy)
    model(torch.tensor([1, 2]))
    assert found == [LOW[policy[:2]]]


# Not there yet


@each_policy
def test_lazy_model_trains_after_its_first_forward(policy: str) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(
            nn.LazyConv2d(4, 3, bias=False), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
        )
        torch.manual_seed(3)
        model(torch.randn(2, 2, 6, 6))
        return model

    def run(model: nn.Module) -> Results:
        for _ in range(2):
            x = torch.randn(2, 2, 6, 6, requires_grad=True)
            model(x).square().mean().backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, make, slack=3)


@each_policy
def test_model_on_meta_is_refused(policy: str) -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(PolicyError) as error:
        wrapprec.wrap(model, policy=policy)
    text = str(error.value)
    assert "Received: a model on the meta device" in text and "Sequential" in text and "to_empty" in text
    assert not any("forward" in module.__dict__ for module in model.modules())
