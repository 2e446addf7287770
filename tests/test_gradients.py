"""Gradients are true right after backward, whatever the scale and however the loop is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import wrapprec
from wrapprec import LossScale

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

Gradients = dict[str, "Tensor | None"]

FOUR: list[Any] = [("16-mixed", 1024), ("16-module", 1024), ("bf16-mixed", None), ("bf16-module", None)]
# The scale alone, in float32: nothing but the borders can be wrong there, and any error shows to the last bits.
EXACT = ("32-true", 1024)
CONFIGS = [*FOUR, EXACT]
SCALED = [c for c in CONFIGS if c[1] is not None]
# Eight rounding steps of the compute dtype in the norm of a gradient: activations, weights and gradients are rounded
# once each in two or three layers. A wrong border is off by the scale, at least 1024.
TOLERANCE = {"16": 8 * 2**-10, "bf": 8 * 2**-7, "32": 1e-5}

each_config = pytest.mark.parametrize(("policy", "scale"), CONFIGS, ids=lambda v: str(v))
each_scaled = pytest.mark.parametrize(("policy", "scale"), SCALED, ids=lambda v: str(v))


class Net(nn.Module):
    """Has an embedding, a norm, a bias that is not used and a head that can be left out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def encode(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(F.gelu(self.norm(self.first(x))))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encode(x))
        return out


def assert_same(got: Gradients, want: Gradients, policy: str, slack: float = 1.0) -> None:
    assert got.keys() == want.keys()
    for name, true in want.items():
        mine = got[name]
        if true is None or mine is None:
            assert mine is None and true is None, f"{name}: {mine} instead of {true}"
            continue
        assert mine.dtype == true.dtype and mine.shape == true.shape and mine.layout == true.layout, name
        mine, true = mine.to_dense().double(), true.to_dense().double()
        off = (mine - true).norm() / true.norm().clamp(min=1e-30)
        assert off <= slack * TOLERANCE[policy[:2]], f"{name}: relative error {off:.2e}"


def grads(model: nn.Module) -> Gradients:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def compare(
    run: Callable[..., Gradients], policy: str, scale: Any, make: Callable[[], nn.Module] = Net, slack: float = 1.0
) -> None:
    """Run a program on a plain model and on a wrapped copy: it must return the same gradients."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    mine = make()
    torch.manual_seed(1)
    want = run(plain)
    assert any(g is not None and g.to_dense().abs().sum() > 0 for g in want.values()), "the reference shows nothing"
    wrapprec.wrap(mine, policy=policy, loss_scale=scale)
    torch.manual_seed(1)
    assert_same(run(mine), want, policy, slack)


def batch(requires_grad: bool = False) -> Tensor:
    return torch.randn(6, 8, requires_grad=requires_grad)


# Scales


@pytest.mark.parametrize("policy", ["16-mixed", "16-module", "32-true"])
@pytest.mark.parametrize("exponent", [0, 10, 16, 24])
def test_gradients_of_parameters_and_inputs_are_true_under_every_scale(policy: str, exponent: int) -> None:
    # The loss is so small that its scaled gradients stay within float16 under the largest scale.
    factor = 16.0 / 2**exponent

    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        (model(x).square().mean() * factor).backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, 2.0**exponent)


@each_config
def test_gradients_have_the_parameters_dtype_and_are_none_where_unused(policy: str, scale: Any) -> None:
    def run(model: Any) -> Gradients:
        model.first.weight.requires_grad_(False)
        model.encode(batch()).square().mean().backward()
        assert model.first.weight.grad is None and model.head.weight.grad is None and model.unused.grad is None
        return grads(model)

    compare(run, policy, scale)


@each_config
def test_autograd_grad_is_true_for_parameters_inputs_and_unused_ones(policy: str, scale: Any) -> None:
    def run(model: Any) -> Gradients:
        x = batch(True)
        wanted = [x, model.first.weight, model.head.bias, model.unused]
        found = torch.autograd.grad(model(x).square().mean(), wanted, allow_unused=True)
        return dict(zip(["x", "first", "head", "unused"], found, strict=True))

    compare(run, policy, scale)


# Higher order


@each_config
def test_gradient_penalty_is_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        penalty = slope.norm(dim=1).sub(1).square().mean()
        penalty.backward()
        assert x.grad is not None
        return {**grads(model), "x": x.grad, "slope": slope.detach()}

    # Twice through the model: twice the rounding.
    compare(run, policy, scale, slack=3)


@each_config
def test_penalty_on_parameter_gradients_is_true(policy: str, scale: Any) -> None:
    def run(model: Any) -> Gradients:
        x = batch(True)
        loss = model(x).square().mean()
        first = torch.autograd.grad(loss, [model.first.weight, model.head.weight], create_graph=True)
        (loss + sum(g.square().sum() for g in first)).backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale, slack=3)


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


@each_config
def test_third_order_gradients_are_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        (one,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (two,) = torch.autograd.grad(one.square().sum(), x, create_graph=True)
        two.square().sum().backward()
        return {**grads(model), "x": x.grad, "two": two.detach()}

    compare(run, policy, scale, make=Smooth, slack=6)


@each_config
def test_double_backward_with_a_gradient_given_from_outside_is_true(policy: str, scale: Any) -> None:
    """The gradient of a gradient with respect to `grad_outputs` crosses the output's border backwards."""

    def run(model: nn.Module) -> Gradients:
        x, direction = batch(True), torch.randn(6, 4, requires_grad=True)
        (vjp,) = torch.autograd.grad(model(x), x, direction, create_graph=True)
        vjp.square().sum().backward()
        return {**grads(model), "x": x.grad, "direction": direction.grad}

    compare(run, policy, scale, slack=3)


# Several losses and backwards


@each_config
def test_several_losses_and_backwards_on_one_graph_are_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        out = model(x)
        out.square().mean().backward(retain_graph=True)
        (out[:, 0].sum() * 0.1).backward(retain_graph=True)
        torch.autograd.backward([out.mean(), out.std()], retain_graph=True)
        out.abs().mean().backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale)


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_accumulation_across_a_change_of_scale_is_true(policy: str) -> None:
    torch.manual_seed(0)
    plain = Net()
    mine = copy.deepcopy(plain)
    handle = wrapprec.wrap(mine, policy=policy, loss_scale=LossScale(init_scale=2.0**8))
    data = [batch() for _ in range(3)]
    sum(plain(x).square().mean() for x in data).backward()
    open_graph = mine(data[0]).square().mean()
    for x in data[1:]:
        state = handle.state_dict()
        state["scales"][0]["scale"] *= 16
        handle.load_state_dict(state)
        mine(x).square().mean().backward()
    assert handle.scale == 2.0**16
    open_graph.backward()  # a graph that was made under the first scale
    assert_same(grads(mine), grads(plain), policy)


@each_config
def test_one_backward_through_two_forwards_under_two_scales_is_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        hidden = model.encode(x)  # type: ignore[operator]  # Net's
        handle = wrapprec.handle_of(model)
        if handle is not None and scale is not None:
            state = handle.state_dict()
            state["scales"][0]["scale"] *= 4
            handle.load_state_dict(state)
        model.head(hidden).square().mean().backward()  # type: ignore[operator]  # Net's
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale)


@each_config
def test_module_called_twice_and_on_its_own_output_is_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        (model(x).square().mean() + model(x * 0.5).abs().mean() + model(model(x).repeat(1, 2)).mean()).backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale)


@each_config
def test_submodule_and_forward_called_directly_are_true(policy: str, scale: Any) -> None:
    def run(model: Any) -> Gradients:
        x = batch(True)
        hidden = model.first(x)
        out = model.head(model.second(model.norm(hidden)))
        (out.square().mean() + model.forward(x).square().mean() + hidden.square().mean()).backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale)


@each_config
def test_forwards_without_gradients_in_between_change_nothing(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        with torch.no_grad():
            model(x)
        loss = model(x).square().mean()
        with torch.inference_mode():
            model(x)
        model.eval()
        model(x)
        model.train()
        loss.backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale)


class Teaches(nn.Module):
    """Runs a layer under no_grad and then for its gradient, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.raw = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.linear(self.layer(x), self.raw)
        return F.mse_loss(F.linear(self.layer(x * 2), self.raw), target.detach())


@each_config
def test_layer_used_under_no_grad_first_and_then_with_gradients_is_true(policy: str, scale: Any) -> None:
    """Autocast would remember the cast that it made under no_grad."""

    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        model(x).backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale, make=Teaches)


# Regularisers and clipping


@each_config
def test_l2_term_on_the_parameters_in_the_loss_is_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        loss = model(batch()).square().mean() + 0.1 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return grads(model)

    compare(run, policy, scale)


class Regular(Net):
    def forward(self, x: Tensor) -> Tensor:
        penalty = sum(p.float().square().sum() for p in self.parameters())
        return super().forward(x).square().mean() + 0.1 * penalty


@each_config
def test_l2_term_inside_forward_over_own_parameters_is_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        model(batch()).backward()
        return grads(model)

    compare(run, policy, scale, make=Regular)


@each_config
def test_clipping_needs_no_unscaling(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        model(batch()).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        clipped = grads(model)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        values = {f"value.{k}": v for k, v in grads(model).items()}
        return {**clipped, **values, "norm": norm.detach()}

    compare(run, policy, scale)


@each_scaled
def test_users_own_gradscaler_composes(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(batch()).square().mean()).backward()
        scaler.unscale_(optimizer)
        found = grads(model)
        scaler.step(optimizer)
        scaler.update()
        return {**found, **{f"stepped.{n}": p.detach() for n, p in model.named_parameters()}}

    compare(run, policy, scale)


# Kinds of models


class Tied(nn.Module):
    def __init__(self, sparse: bool = False, by_module: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, sparse=sparse)
        self.body = nn.Linear(8, 8)
        self.by_module = by_module
        if by_module:
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(tokens)))
        out: Tensor = self.head(hidden) if self.by_module else F.linear(hidden, self.embed.weight)
        return out


@each_config
@pytest.mark.parametrize("by_module", [True, False])
def test_tied_weights_are_true(policy: str, scale: Any, by_module: bool) -> None:
    def run(model: nn.Module) -> Gradients:
        tokens = torch.arange(10).view(2, 5)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        return grads(model)

    compare(run, policy, scale, make=lambda: Tied(by_module=by_module))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(tokens))
        return out


@each_config
def test_sparse_gradients_are_true_and_stay_sparse(policy: str, scale: Any) -> None:
    def run(model: Any) -> Gradients:
        tokens = torch.tensor([[1, 2, 2], [7, 1, 9]])
        model(tokens).square().mean().backward()
        model(tokens).square().mean().backward()
        assert model.embed.weight.grad.is_sparse
        return grads(model)

    compare(run, policy, scale, make=Sparse)


class Complex(nn.Module):
    """Takes and gives complex and float64 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.wave = nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.exact = nn.Parameter(torch.randn(8, dtype=torch.float64))

    def forward(self, x: Tensor, z: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x).float() * z * self.wave, d * self.exact


@each_config
def test_gradients_of_complex_and_float64_tensors_are_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        z = torch.randn(6, 8, dtype=torch.complex64, requires_grad=True)
        d = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
        waves, exact = model(x, z, d)
        assert waves.dtype == torch.complex64 and exact.dtype == torch.float64
        (waves.abs().square().mean() + exact.square().mean()).backward()
        found = {**grads(model), "x": x.grad, "z": z.grad, "d": d.grad}
        return {k: torch.view_as_real(v) if v is not None and v.is_complex() else v for k, v in found.items()}

    compare(run, policy, scale, make=Complex)


class Blocks(nn.Module):
    """Two blocks, checkpointed or not."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.mode == "none":
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return x


@each_config
@pytest.mark.parametrize("mode", ["reentrant", "not"])
def test_checkpointed_blocks_are_true(policy: str, scale: Any, mode: str) -> None:
    def run(model: Any) -> Gradients:
        x = batch(True)
        model(x).square().mean().backward()
        model(x).square().mean().backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale, make=lambda: Blocks(mode))


@each_config
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("with_loss", [True, False])
def test_checkpoint_around_the_whole_model_is_true(policy: str, scale: Any, reentrant: bool, with_loss: bool) -> None:
    def run(model: Any) -> Gradients:
        x = batch(True)

        def whole(x: Tensor) -> Tensor:
            out: Tensor = model(x)
            return F.softplus(out).square() if with_loss else out

        checkpoint(whole, x, use_reentrant=reentrant).square().mean().backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale)


@each_config
def test_checkpoint_of_a_block_called_from_outside_is_true(policy: str, scale: Any) -> None:
    def run(model: Any) -> Gradients:
        x = batch(True)
        hidden = checkpoint(model.blocks[0], model.stem(x), use_reentrant=False)
        checkpoint(model.blocks[1], hidden, use_reentrant=False).square().mean().backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale, make=lambda: Blocks("none"))


class Forces(nn.Module):
    """An energy and its negative gradient, both from one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Smooth()

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        energy = self.net(position).sum()
        (slope,) = torch.autograd.grad(energy, position, create_graph=True)
        return energy, -slope


@each_config
def test_autograd_grad_inside_forward_is_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        energy, force = model(x)
        (energy * 0.1 + force.square().mean()).backward()
        return {**grads(model), "x": x.grad, "force": force.detach()}

    compare(run, policy, scale, make=Forces, slack=3)


class Learner(nn.Module):
    """Adapts its own weights inside forward, as MAML does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Smooth()

    def forward(self, x: Tensor) -> Tensor:
        named = dict(self.net.named_parameters())
        inner = functional_call(self.net, named, (x,)).float().square().mean()
        slopes = torch.autograd.grad(inner, list(named.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(named.items(), slopes, strict=True)}
        return functional_call(self.net, fast, (x,)).float().square().mean()


@each_config
def test_weights_adapted_inside_forward_are_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        model(x).backward()
        model(x).backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale, make=Learner, slack=3)


@each_config
def test_weights_adapted_outside_by_functional_call_are_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        fast = dict(model.named_parameters())
        for _ in range(2):
            loss = functional_call(model, fast, (x,)).square().mean()
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), slopes, strict=True)}
        functional_call(model, fast, (x,)).square().mean().backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale, make=Smooth, slack=4)


@each_config
def test_recurrent_models_are_true(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = torch.randn(2, 3, 8, requires_grad=True)
        out, (h, c) = model(x)
        (out.square().mean() + h.mean() + c.square().mean()).backward()
        return {**grads(model), "x": x.grad}

    compare(run, policy, scale, make=lambda: nn.LSTM(8, 8, batch_first=True))


@each_config
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "hooked", "orthogonal"])
def test_parametrised_weights_are_true(policy: str, scale: Any, kind: str) -> None:
    def make() -> nn.Module:
        layer = nn.Linear(8, 8)
        if kind == "hooked":
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                torch.nn.utils.weight_norm(layer)
        else:
            getattr(torch.nn.utils.parametrizations, kind)(layer)
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 4))

    def run(model: nn.Module) -> Gradients:
        for _ in range(3):
            x = batch(True)
            model(x).square().mean().backward()
        return {**grads(model), "x": x.grad, **{n: b for n, b in model.named_buffers() if b.is_floating_point()}}

    compare(run, policy, scale, make=make, slack=2)


@each_config
def test_lazy_modules_are_true_in_the_very_first_step(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        torch.manual_seed(3)
        model(batch()).square().mean().backward()
        return grads(model)

    torch.manual_seed(0)
    plain, mine = (nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4)) for _ in range(2))
    wrapprec.wrap(mine, policy=policy, loss_scale=scale)
    want = run(plain)
    assert_same(run(mine), want, policy)


# Several models


@each_config
def test_gan_step_is_true_for_both_models(policy: str, scale: Any) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.Linear(4, 8), Smooth()])
    mine = copy.deepcopy(plain)
    wrapprec.wrap([mine[0], mine[1]], policy=policy, loss_scale=scale)
    results = []
    for generator, critic in (plain, mine):
        torch.manual_seed(1)
        noise, real = torch.randn(6, 4), torch.randn(6, 8)
        fake = generator(noise)
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()).backward()
        found = {f"d.{k}": v for k, v in grads(critic).items()}
        critic.zero_grad()
        critic.requires_grad_(False)
        F.softplus(-critic(generator(noise))).mean().backward()
        critic.requires_grad_(True)
        results.append(
            {**found, **{f"g.{k}": v for k, v in grads(generator).items()}, "none": critic.first.weight.grad}
        )
    assert_same(results[1], results[0], policy)


class Caller(nn.Module):
    """Calls a model that it does not own inside its forward."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(4, 4)
        self.others = [other]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.others[0](torch.tanh(self.before(x))))
        return out


@each_config
@pytest.mark.parametrize("order", ["together", "inner first", "outer first"])
def test_wrapped_model_called_inside_another_is_true(policy: str, scale: Any, order: str) -> None:
    torch.manual_seed(0)
    inner, outer = Net(), None
    plain = Caller(inner)
    inner = copy.deepcopy(inner)
    outer = copy.deepcopy(plain)
    outer.others = [inner]
    other_scale = None if scale is None else 64
    if order == "together":
        wrapprec.wrap([outer, inner], policy=policy, loss_scale=scale)
    elif order == "inner first":
        wrapprec.wrap(inner, policy=policy, loss_scale=other_scale)
        wrapprec.wrap(outer, policy=policy, loss_scale=scale)
    else:
        wrapprec.wrap(outer, policy=policy, loss_scale=scale)
        wrapprec.wrap(inner, policy=policy, loss_scale=other_scale)
    results = []
    for model in (plain, outer):
        torch.manual_seed(1)
        x = batch(True)
        loss = 0.01 * (model(x).square().mean() + model.others[0](x).square().mean())
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()
        inside = {f"inner.{k}": v for k, v in grads(model.others[0]).items()}
        results.append({**grads(model), **inside, "x": x.grad})
    assert_same(results[1], results[0], policy, slack=3)


class Shares(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.encoder(x)))
        return out


@each_config
def test_encoder_shared_by_two_models_is_true(policy: str, scale: Any) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList([Shares(nn.Linear(8, 8))])
    plain.append(Shares(plain[0].encoder))
    mine = copy.deepcopy(plain)
    assert mine[0].encoder is mine[1].encoder
    wrapprec.wrap([mine[0], mine[1]], policy=policy, loss_scale=None if scale is None else 64)
    for one, two in (plain, mine):
        torch.manual_seed(1)
        x = batch()
        (one(x).square().mean() + two(x).abs().mean() + one.encoder(x).mean()).backward()
    assert_same(grads(mine), grads(plain), policy)


@each_config
def test_two_optimizers_on_one_model_see_true_gradients(policy: str, scale: Any) -> None:
    torch.manual_seed(0)
    plain = Net()
    mine = copy.deepcopy(plain)
    found = []
    for model in (plain, mine):
        torch.manual_seed(1)
        body = torch.optim.SGD([*model.first.parameters(), *model.second.parameters()], lr=0.1)
        head = torch.optim.Adam(model.head.parameters(), lr=0.01)
        if model is mine:
            wrapprec.wrap(mine, [body, head], policy, loss_scale=scale)
        for _ in range(2):
            body.zero_grad()
            model(batch()).square().mean().backward()
            body.step()
        found.append(grads(model))
        head.step()
    assert_same(found[1], found[0], policy, slack=2)


# In place


def _add(out: Tensor) -> None:
    out += 1


def _zero_row(out: Tensor) -> None:
    out[0] = 0


def _relu(out: Tensor) -> None:
    F.relu_(out)


def _scale_view(out: Tensor) -> None:
    out[2:].mul_(2)


@each_config
@pytest.mark.parametrize("change", [_add, _zero_row, _relu, _scale_view])
@pytest.mark.parametrize("last", ["linear", "tanh", "view"])
def test_changing_an_output_in_place_is_true_or_torchs_own_error(
    policy: str, scale: Any, change: Callable[[Tensor], None], last: str
) -> None:
    class Last(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return torch.tanh(out) if last == "tanh" else out[:, 1:] if last == "view" else out

    def run(model: nn.Module) -> Gradients:
        out = model(batch())
        change(out)
        out.square().mean().backward()
        return grads(model)

    try:
        compare(run, policy, scale, make=Last)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) and last == "tanh"


@each_scaled
def test_input_changed_in_place_in_forward_is_true_or_an_error(policy: str, scale: Any) -> None:
    def run(model: nn.Module) -> Gradients:
        x = batch(True)
        model(x * 1.0).square().mean().backward()
        return {**grads(model), "x": x.grad}

    try:
        compare(run, policy, scale, make=lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)))
    except wrapprec.ModelChangedError as error:
        assert "modified in place" in str(error)


def test_default_dtype_of_the_program_does_not_matter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = Net().float()
        plain = copy.deepcopy(model)
        wrapprec.wrap(model, policy="16-module", loss_scale=1024)
        x = torch.randn(6, 8, dtype=torch.float32)
        model(x).square().mean().backward()
        plain(x).square().mean().backward()
        assert_same(grads(model), grads(plain), "16-module")
    finally:
        torch.set_default_dtype(torch.float32)


def test_per_sample_gradients_by_vmap_are_true() -> None:
    torch.manual_seed(0)
    plain = Smooth()
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy="bf16-module")
    x = batch()

    def per_sample(model: nn.Module) -> Any:
        def loss(params: Any, one: Tensor) -> Tensor:
            return functional_call(model, params, (one.unsqueeze(0),)).square().sum()

        params = {k: v.detach() for k, v in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)

    assert_same(per_sample(mine), per_sample(plain), "bf16-module")


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_many_reentrant_checkpoints_in_one_backward_have_true_gradients(policy):
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.block = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(80):
                x = x + 0.01 * checkpoint(self.block, x, use_reentrant=True)
            return x

    torch.manual_seed(0)
    plain = Deep()
    model = copy.deepcopy(plain)
    wrapprec.wrap(model, policy=policy, loss_scale=256.0)
    x = torch.randn(3, 4)
    plain(x).pow(2).mean().backward()
    model(x).pow(2).mean().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        # 80 additions in float16, each rounded to 2**-12.
        assert (mine.grad - theirs.grad).norm() <= 0.02 * theirs.grad.norm()


@pytest.mark.parametrize("policy", ["16-mixed", "16-module", "bf16-mixed", "bf16-module"])
@pytest.mark.parametrize("island", [False, True])
def test_output_that_is_a_view_of_another_sees_what_is_written_into_it(policy, island):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.fc(x)
            return h, h[:, 0]

    torch.manual_seed(0)
    plain = Both()
    model = copy.deepcopy(plain)
    rules = [("fc", "float32")] if island else []
    wrapprec.wrap(model, policy=policy, rules=rules, loss_scale=256.0 if policy.startswith("16") else None)
    x = torch.randn(5, 4)
    losses = []
    for net in (plain, model):
        whole, column = net(x)
        whole.mul_(3)
        loss = whole.pow(2).mean() + column.sum()
        loss.backward()
        losses.append(float(loss.detach()))
    # Two roundings of 2**-9 (bf16) or less, on terms of order one.
    assert losses[1] == pytest.approx(losses[0], rel=0.03, abs=0.03)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 0.03 * theirs.grad.norm()


def test_loss_kept_on_an_object_that_a_module_holds_is_mended():
    class Stats:
        aux: Tensor | None = None

    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.stats = nn.Linear(4, 4), Stats()

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            self.stats.aux = h.pow(2).mean()
            return h

    torch.manual_seed(0)
    plain = Moe()
    model = copy.deepcopy(plain)
    wrapprec.wrap(model, policy="16-mixed", loss_scale=1024.0)
    x = torch.randn(5, 4)
    for net in (plain, model):
        (net(x).mean() + net.stats.aux).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        # A few roundings of 2**-12.
        assert (mine.grad - theirs.grad).norm() <= 0.005 * theirs.grad.norm()


def test_backward_hook_inside_a_scaled_model_is_warned_of_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrapprec.wrap(model, policy="16-mixed", loss_scale=1024.0)
    model[1].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    with pytest.warns(wrapprec.WrapprecWarning, match="loss scale times the true") as caught:
        model(torch.ones(1, 4)).sum().backward()
        model(torch.ones(1, 4)).sum().backward()
    assert len(caught) == 1
