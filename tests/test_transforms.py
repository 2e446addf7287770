"""torch.func, forward-mode AD and torch.autograd.functional around and inside a wrapped model, as in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd import functional
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_flatten

import wrapprec
from wrapprec import LossScale, levels

# torch 2.13 scripts its own formulas when forward-mode AD first needs one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    # What `linearize` records of any module.
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
# Each tensor's own relative error. Up to three derivatives through four layers are some twenty rounding steps of
# 2**-9 (bf16) or 2**-12 (f16) each, partly of one sign. A border missed or crossed twice is off by 2**10 at least.
TOLERANCE = {"bf": 0.1, "16": 0.0125}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


_NUMBERS = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3))


def batch(rows: int = 5) -> Tensor:
    return _NUMBERS[0, :rows].clone()


def direction(rows: int = 5) -> Tensor:
    return _NUMBERS[1, :rows].clone()


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda params, x: functional_call(model, params, (x,)).square().mean()


def assert_same(got: Any, want: Any, policy: str) -> None:
    got, got_tree = tree_flatten(got)
    want, want_tree = tree_flatten(want)
    assert got_tree == want_tree
    for mine, true in zip(got, want, strict=True):
        if not isinstance(true, Tensor):
            assert mine == true
            continue
        assert mine.dtype == true.dtype and mine.shape == true.shape
        off = (mine.double() - true.double()).norm() / true.double().norm().clamp(min=1e-12)
        assert off <= TOLERANCE[policy[:2]], f"relative error {off:.2e} in a tensor of shape {tuple(true.shape)}"


def compare(run: Callable[[Any], Any], policy: str, make: Callable[[], nn.Module] = Net, **options: Any) -> None:
    """Run a program on a plain model and on a wrapped copy, at the policy's own loss scale unless `options` say."""
    torch.manual_seed(0)
    plain = make()
    mine = copy.deepcopy(plain)
    handle = wrapprec.wrap(mine, policy=policy, **options)
    assert_same(run(mine), run(plain), policy)
    scaler = handle.state_dict() if policy.startswith("16") else None
    assert scaler is None or torch.tensor(handle.scale).isfinite()


def param_grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: param.grad for name, param in model.named_parameters()}


def vmap_backward(model: nn.Module) -> Any:
    x = batch().requires_grad_()
    vmap(model)(x).square().mean().backward()
    return x.grad, param_grads(model)


def ensemble(model: nn.Module) -> Any:
    params, _ = stack_module_state([model, copy.deepcopy(model)])
    vmap(lambda p: functional_call(model, p, (batch(),)))(params).square().mean().backward()
    return {name: param.grad for name, param in params.items()}


def ensemble_grad(model: nn.Module) -> Any:
    stacked = {name: torch.stack([param, 1.1 * param]) for name, param in detached(model).items()}
    return grad(lambda params: vmap(lambda p: loss_of(model)(p, batch()))(params).sum())(stacked)


def vector_jacobian(model: nn.Module) -> Any:
    out, pull = vjp(model, batch())
    return out, pull(torch.ones_like(out) / out.numel())


def linearized(model: nn.Module) -> Any:
    out, push = linearize(model, batch())
    return out, push(direction())


def penalty(inner: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> Callable[[nn.Module], Any]:
    """A loss made of derivatives, differentiated by the ordinary backward."""

    def run(model: nn.Module) -> Any:
        vmap(inner(model))(batch()).square().mean().backward()
        return param_grads(model)

    return run


def mean_square(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().mean()


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "grad by detached parameters": lambda m: grad(loss_of(m))(detached(m), batch()),
    "grad by the parameters themselves": lambda m: grad(loss_of(m))(dict(m.named_parameters()), batch()),
    "grad by the input": lambda m: grad(mean_square(m))(batch()),
    "grad and value, with aux": lambda m: grad_and_value(
        lambda p, x: (loss_of(m)(p, x), functional_call(m, p, (x,))), has_aux=True
    )(detached(m), batch()),
    "grad of grad": lambda m: grad(lambda x: grad(mean_square(m))(x).square().sum())(batch()),
    "vmap": lambda m: vmap(m)(batch()),
    "vmap in chunks": lambda m: vmap(m, chunk_size=2)(batch()),
    "vmap of vmap": lambda m: vmap(vmap(m))(batch(6).reshape(2, 3, 4)),
    "backward through vmap": vmap_backward,
    "grad through vmap": lambda m: grad(lambda x: vmap(m)(x).square().mean())(batch()),
    "per-sample gradients": lambda m: vmap(grad(loss_of(m)), (None, 0))(detached(m), batch()),
    "backward through an ensemble": ensemble,
    "grad through an ensemble": ensemble_grad,
    "vjp": vector_jacobian,
    "jvp": lambda m: jvp(m, (batch(),), (direction(),)),
    "linearize": linearized,
    "grad by a tangent": lambda m: grad(lambda t: jvp(m, (batch(),), (t,))[1].square().mean())(direction()),
    "jacrev": lambda m: jacrev(m)(batch()[0]),
    "jacfwd": lambda m: jacfwd(m)(batch()[0]),
    "jacrev by parameters": lambda m: jacrev(lambda p: functional_call(m, p, (batch(),)))(detached(m)),
    "jacfwd by parameters": lambda m: jacfwd(lambda b: functional_call(m, {"last.bias": b}, (batch(),)))(
        detached(m)["last.bias"]
    ),
    "hessian": lambda m: hessian(mean_square(m))(batch()[0]),
    "jacrev of jacrev": lambda m: jacrev(jacrev(mean_square(m)))(batch()[0]),
    "jacrev of jacfwd": lambda m: jacrev(jacfwd(mean_square(m)))(batch()[0]),
    "backward through per-sample gradients": penalty(lambda m: grad(mean_square(m))),
    "backward through jacrev": penalty(jacrev),
    "backward through jacfwd": penalty(jacfwd),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_transform_around_the_model_is_true_at_the_first_scale(program: str, policy: str) -> None:
    compare(PROGRAMS[program], policy)


def dual(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(model(forward_ad.make_dual(batch(), direction())))
        return out.primal.detach(), out.tangent.detach()


def dual_parameters(model: nn.Module) -> Any:
    # A tangent for one of two parameters that are lent together, none for the other.
    with forward_ad.dual_level():
        params = detached(model)
        params["last.weight"] = forward_ad.make_dual(params["last.weight"], params["last.weight"].cos())
        out = forward_ad.unpack_dual(functional_call(model, params, (batch(),)))
        return out.primal, out.tangent


def reverse_over_forward(model: nn.Module) -> Any:
    tangent = direction().requires_grad_()
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(model(forward_ad.make_dual(batch(), tangent)))
        out.tangent.square().mean().backward()
    return tangent.grad, param_grads(model)


def batched_grads(model: nn.Module) -> Any:
    x = batch().requires_grad_()
    out = model(x).mean(0)
    return torch.autograd.grad(out, (x, *model.parameters()), torch.eye(3), is_grads_batched=True)


def batched_grads_of_grads(model: nn.Module) -> Any:
    x = batch(2).requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    return torch.autograd.grad(first.flatten(), x, torch.eye(8), is_grads_batched=True)


FUNCTIONAL: dict[str, Callable[[Any], Any]] = {
    "dual tensors": dual,
    "dual parameters": dual_parameters,
    "backward through tangents": reverse_over_forward,
    "jacobian": lambda m: functional.jacobian(m, batch(2)),
    "jacobian, vectorized": lambda m: functional.jacobian(m, batch(2), vectorize=True),
    "jacobian, forward mode": lambda m: functional.jacobian(m, batch(2), vectorize=True, strategy="forward-mode"),
    "hessian": lambda m: functional.hessian(mean_square(m), batch(2)),
    "hessian, vectorized": lambda m: functional.hessian(mean_square(m), batch(2), vectorize=True),
    "vhp": lambda m: functional.vhp(mean_square(m), batch(), direction()),
    "hvp": lambda m: functional.hvp(mean_square(m), batch(), direction()),
    "vjp": lambda m: functional.vjp(m, batch(), torch.full((5, 3), 0.1)),
    "jvp": lambda m: functional.jvp(m, batch(), direction()),
    "is_grads_batched": batched_grads,
    "is_grads_batched, second order": batched_grads_of_grads,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("program", FUNCTIONAL)
def test_forward_mode_and_autograd_functional_are_true(program: str, policy: str) -> None:
    # Gradients of 1 at the outputs, times the usual first scale of 2**16, are inf in float16: see the test below.
    options = {"loss_scale": LossScale(init_scale=1024.0)} if policy.startswith("16") else {}
    compare(FUNCTIONAL[program], policy, **options)


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_jacobian_that_overflows_is_inf_and_lowers_the_scale_until_it_is_true(policy: str) -> None:
    torch.manual_seed(0)
    plain = Net()
    mine = copy.deepcopy(plain)
    handle = wrapprec.wrap(mine, policy=policy)
    first = functional.jacobian(mine, batch(2))
    assert not first.isfinite().all(), "no silent number"
    for _ in range(4):
        again = functional.jacobian(mine, batch(2))
    assert handle.scale < 2.0**16
    assert_same(again, functional.jacobian(plain, batch(2)), policy)


class Pinn(nn.Module):
    """Returns the derivatives of a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return vmap(jacrev(self.inner))(x), vmap(hessian(lambda row: self.inner(row).sum()))(x)


class Maml(nn.Module):
    """Takes a gradient step in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> Tensor:
        params = dict(self.inner.named_parameters())
        slopes = grad(loss_of(self.inner))(params, x)
        return functional_call(self.inner, {k: params[k] - 0.5 * slopes[k] for k in params}, (x,))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [Pinn, Maml])
def test_transform_inside_forward_has_true_gradients(kind: type[nn.Module], policy: str) -> None:
    def run(model: nn.Module) -> Any:
        out = model(batch())
        sum(one.square().mean() for one in (out if isinstance(out, tuple) else (out,))).backward()
        return param_grads(model)

    compare(run, policy, make=kind)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gradient_step_outside_and_backward_through_it_are_true(policy: str) -> None:
    def run(model: nn.Module) -> Any:
        params = dict(model.named_parameters())
        slopes = grad(loss_of(model))(params, batch())
        functional_call(model, {k: params[k] - 0.5 * slopes[k] for k in params}, (batch(),)).square().mean().backward()
        return param_grads(model)

    # The second forward is in no transform, and the first scale of 2**16 fits a mean of squares.
    compare(run, policy)


class Auxiliary(nn.Module):
    """Leaves a part of the loss on itself, in an attribute and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 3)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        self.auxiliary = hidden.square().mean()
        self.kept["mean"] = hidden.mean()
        return self.last(hidden)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("samples", ["together", "one by one"])
def test_loss_left_on_the_module_is_true_under_a_transform(samples: str, policy: str) -> None:
    def run(model: Any) -> Any:
        def loss(params: Any, x: Tensor) -> Tensor:
            return functional_call(model, params, (x,)).square().mean() + model.auxiliary + model.kept["mean"]

        slope = grad(loss) if samples == "together" else vmap(grad(loss), (None, 0))
        return slope(detached(model), batch())

    compare(run, policy, make=Auxiliary)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_transform_left_on_the_module_does_not_disturb_the_next_loop(policy: str) -> None:
    def run(model: Any) -> Any:
        vmap(grad(loss_of(model)), (None, 0))(detached(model), batch())
        jacfwd(model)(batch()[0])
        (model(batch()).square().mean() + model.auxiliary + model.kept["mean"]).backward()
        return param_grads(model)

    # The gradient of a mean is 1, which the first scale of 2**16 makes inf in float16.
    options = {"loss_scale": 1024.0} if policy.startswith("16") else {}
    compare(run, policy, make=Auxiliary, **options)


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_leak_under_a_transform_is_an_error(policy: str) -> None:
    class Leaky(Auxiliary):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            leaked.append(hidden.mean())
            return self.last(hidden)

    leaked: list[Tensor] = []
    model = Leaky()
    wrapprec.wrap(model, policy=policy)
    with pytest.raises(wrapprec.ScaleLeakError, match="is reached by a tensor that left forward"):
        # Both by the way of the outputs and past it: only the walk along the level's own graph tells.
        grad(lambda p, x: functional_call(model, p, (x,)).square().mean() + leaked[-1])(detached(model), batch())
    assert_same(grad(lambda p: functional_call(model, p, (batch(),)).mean())(detached(model)), _plain(model), policy)


def _plain(model: nn.Module) -> Any:
    copied = copy.deepcopy(model)
    wrapprec.unwrap(copied)
    return grad(lambda p: functional_call(copied, p, (batch(),)).mean())(detached(copied))


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_overflow_under_a_transform_shows_skips_the_step_and_lowers_the_scale(policy: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, policy)
    before = copy.deepcopy(model.state_dict())

    def step(factor: float) -> dict[str, Tensor]:
        loss = loss_of(model)
        slopes = vmap(grad(lambda p, x: loss(p, x) * factor), (None, 0))(detached(model), batch())
        for name, param in model.named_parameters():
            param.grad = slopes[name].mean(0)
        optimizer.step()
        return slopes

    slopes = step(1e6)
    assert not all(s.isfinite().all() for s in slopes.values())
    assert handle.step_was_skipped and handle.scale == 2.0**15
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(1.0)
    assert not handle.step_was_skipped and handle.scale == 2.0**15
    assert not torch.equal(model.last.weight, before["last.weight"])


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_scale_is_no_wrapper_of_a_transform_that_is_over(policy: str) -> None:
    model = Net()
    handle = wrapprec.wrap(model, policy=policy)
    for _ in range(2):
        hessian(lambda x: model(x).square().mean() * 1e9)(batch()[0])
        vmap(grad(lambda x: model(x).square().mean() * 1e9))(batch())
    scaler = model.forward.shared.scaler
    state = (scaler.scale, scaler.seen, scaler.counted, scaler.growth_tracker, scaler.consecutive, scaler.cautious())
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in state)
    # Each forward settles what the transform before it saw.
    assert handle.scale <= 2.0**13 and levels.depth() == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_training_goes_on_truly_between_transforms(policy: str) -> None:
    torch.manual_seed(0)
    plain = Net()
    mine = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    handle = wrapprec.wrap(mine, optimizer, policy)
    for _ in range(3):
        for model, stepped in ((mine, optimizer), (plain, other)):
            jacrev(model)(batch()[0])
            stepped.zero_grad()
            model(batch()).square().mean().backward()
            stepped.step()
    assert handle.skipped_steps == 0
    assert_same(dict(mine.named_parameters()), dict(plain.named_parameters()), policy)


def test_randomness_of_vmap_reaches_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    wrapprec.wrap(model, policy="bf16-module")
    same, other = vmap(model, randomness="different")(torch.ones(2, 4))
    assert not torch.equal(same == 0, other == 0)
