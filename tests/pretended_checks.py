"""What `test_pretended.py` runs in a process of its own, on CUDA devices that are not there (see `pretended.py`)."""

from __future__ import annotations

import copy
import itertools
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pretended
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wrapprec import LossScale, NonFiniteError, resolve, unwrap, wrap
from wrapprec.backends.select import backend_for
from wrapprec.flags import check_and_scale_, non_finite
from wrapprec.recipe import RECIPES

MIXED = ["16-mixed", "bf16-mixed", "16-module", "bf16-module"]
FORMS: list[dict[str, Any]] = [{"fused": True}, {"foreach": True}, {"foreach": False}]
# A step's rounding of 2**-8 (bfloat16, to nearest) in each of a handful of operations, forward and backward.
NEAR = 6 * 2**-8


class Block(nn.Module):
    """Attention and a feed-forward part, as in a GPT."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.ff(x)


class Gpt(nn.Module):
    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(11, 16), nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.words.weight
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if self.recomputes else block(x)
        return self.head(self.norm(x)).transpose(1, 2)


def convnet() -> nn.Module:
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.GroupNorm(2, 8)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).to(
        memory_format=torch.channels_last
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, lambda: (torch.randn(32, 8), torch.randint(0, 4, (32,)))),
    "convnet": (convnet, lambda: (torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,)))),
    "gpt": (Gpt, lambda: (torch.randint(0, 11, (4, 6)), torch.randint(0, 11, (4, 6)))),
    "recomputed": (lambda: Gpt(True), lambda: (torch.randint(0, 11, (4, 6)), torch.randint(0, 11, (4, 6)))),
}


class Split(nn.Module):
    """Layers on several devices; an activation follows them."""

    def __init__(self, *places: str) -> None:
        super().__init__()
        self.places = places
        self.bad = 0, 1.0
        self.layers = nn.ModuleList(nn.Linear(8, 8).to(place) for place in places)

    def forward(self, x: Tensor) -> Tensor:
        for number, (layer, place) in enumerate(zip(self.layers, self.places, strict=True)):
            x = layer(x.to(place)).tanh()
            bad, factor = self.bad
            if number == bad and factor != 1.0:
                # Of this layer's weights alone: what goes further back is as it was.
                layer.weight.register_hook(lambda grad, factor=factor: grad * factor)
        return x


def near(got: Tensor, true: Tensor, tolerance: float = NEAR) -> None:
    got, true = got.detach().cpu().double(), true.detach().cpu().double()
    assert (got - true).norm() <= tolerance * true.norm() + 1e-12, float((got - true).norm() / true.norm())


def put(model: nn.Module) -> nn.Module:
    """A copy on the first device; `Module.to` gives each place a parameter of its own there, tied or not."""
    there = copy.deepcopy(model).to("cuda")
    if isinstance(there, Gpt):
        there.head.weight = there.words.weight
    return there


def scale_for(policy: str, scale: Any = 1024.0) -> dict[str, Any]:
    return {"loss_scale": LossScale(init_scale=scale)} if policy.startswith("16") else {}


def expect_waits(number: int) -> None:
    assert len(pretended.waits) == number, [(wait.what, wait.where) for wait in pretended.waits]


def check_gradients(policy: str, kind: str) -> None:
    """True gradients on the device, without a wait."""
    make, data = MODELS[kind]
    true, (x, y) = make(), data()
    model = put(true)
    wrap(model, None, policy, **({"loss_scale": 1024.0} if policy.startswith("16") else {}))
    there, wanted = x.to("cuda"), y.to("cuda")
    F.cross_entropy(model(there), wanted).backward()  # the audit looks at the first ones
    model.zero_grad()
    F.cross_entropy(true(x), y).backward()
    pretended.waits.clear()
    F.cross_entropy(model(there), wanted).backward()
    expect_waits(0)
    flat = [torch.cat([p.grad.cpu().flatten() for p in one.parameters()]) for one in (model, true)]
    assert all(p.grad.device == torch.device("cuda:0") for p in model.parameters())
    # Batch statistics of 8 images amplify what is rounded before them.
    near(*flat, tolerance=0.1 if kind == "convnet" else NEAR)


def check_steps(policy: str, form: dict[str, Any], kind: str) -> None:
    """A loop follows float32's; the host waits for a step once, and not at all where the kernel takes the flag."""
    make, data = MODELS[kind]
    true, (x, y) = make(), data()
    model = put(true)
    # SGD itself reads nothing in any form.
    optimizer, other = (torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, **form) for one in (model, true))
    handle = wrap(model, optimizer, policy, **scale_for(policy))
    there, wanted = x.to("cuda"), y.to("cuda")
    once = policy.startswith("16") and not form.get("fused")
    for turn in range(5):
        pretended.waits.clear()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(there), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if turn > 0:  # the first momentum is made, and an audit may look
            expect_waits(once)
        other.zero_grad()
        true_loss = F.cross_entropy(true(x), y)
        true_loss.backward()
        torch.nn.utils.clip_grad_norm_(true.parameters(), 1.0)
        other.step()
    assert handle.skipped_steps == 0
    near(loss, true_loss)


def check_overflow(form: dict[str, Any], places: tuple[str, ...]) -> None:
    """An overflow on any device skips the step on all, and lowers the scale; fused steps do not tell the host."""
    model = Split(*places)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **form)
    handle = wrap(model, optimizer, "16-mixed", **scale_for("16-mixed"))
    x = torch.randn(4, 8).to("cuda")
    for bad in range(len(places)):
        before = [p.detach().cpu().clone() for p in model.parameters()]
        optimizer.zero_grad()
        # The second is the factor in the backward of this one layer.
        model.bad = bad, torch.inf
        pretended.waits.clear()
        model(x).sum().backward()
        for param in model.parameters():
            param.grad.nan_to_num_().clamp_(-1, 1)
        optimizer.step()
        if all(place.startswith("cuda") for place in places):
            expect_waits(0 if form.get("fused") else 1)
        assert handle.step_was_skipped, places[bad]
        assert handle.scale == 1024.0 / 2 ** (bad + 1)
        assert all(torch.equal(a, b.detach().cpu()) for a, b in zip(before, model.parameters(), strict=True))
    model.bad = 0, 1.0
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert not handle.step_was_skipped and handle.skipped_steps == len(places)


def check_split(policy: str, form: dict[str, Any], places: tuple[str, ...]) -> None:
    """Layers on several devices have true gradients and follow float32."""
    model = Split(*places)
    true = Split(*("cpu" for _ in places))
    true.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    optimizer, other = (torch.optim.SGD(one.parameters(), lr=0.1, **form) for one in (model, true))
    wrap(model, optimizer, policy, **scale_for(policy))
    x = torch.randn(16, 8)
    for _ in range(3):
        for one, step in ((model, optimizer), (true, other)):
            step.zero_grad()
            one(x).square().mean().backward()
        for mine, its in zip(model.parameters(), true.parameters(), strict=True):
            assert mine.grad.device == mine.device
            near(mine.grad, its.grad)
        for step in (optimizer, other):
            step.step()


def check_autocast_list() -> None:
    """Under op casting the list is CUDA's own: softmax and exp in float32, where the CPU keeps bfloat16."""
    seen: dict[str, torch.dtype] = {}

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            seen[f"{x.device.type} linear"] = x.dtype
            seen[f"{x.device.type} softmax"] = x.softmax(-1).dtype
            seen[f"{x.device.type} exp"] = x.exp().dtype
            return x

    for place in ("cuda", "cpu"):
        wrap(Net(4, 4).to(place), None, "bf16-mixed").plan  # noqa: B018
        model = Net(4, 4).to(place)
        wrap(model, None, "bf16-mixed")
        model(torch.randn(2, 4).to(place))
    assert seen["cuda linear"] == seen["cpu linear"] == torch.bfloat16
    assert seen["cuda softmax"] == seen["cuda exp"] == torch.float32
    assert seen["cpu softmax"] == torch.bfloat16


def check_penalty(policy: str) -> None:
    """A gradient penalty, the gradient of a gradient, is true."""
    true, x = mlp(), torch.randn(8, 8)
    model = put(true)
    wrap(model, None, policy, **({"loss_scale": 64.0} if policy.startswith("16") else {}))
    for one, given in ((model, x.to("cuda")), (true, x.clone())):
        given = given.requires_grad_()
        (grad,) = torch.autograd.grad(one(given).square().sum(), given, create_graph=True)
        grad.square().sum().backward()
    # Rounded in forward, backward and the backward of that.
    near(model[0].weight.grad, true[0].weight.grad, tolerance=2 * NEAR)


def check_bfloat16_weights() -> None:
    """CUDA's kernel that divides by the scale takes no bfloat16: such weights go another way."""
    true, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(8, 8)
    model = put(true)
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
    handle = wrap(model, optimizer, "16-mixed", rules=[("1", "bf16-true")], loss_scale=1000.0)
    model(x.to("cuda")).square().mean().backward()
    true(x).square().mean().backward()
    for mine, its in zip(model.parameters(), true.parameters(), strict=True):
        near(mine.grad, its.grad)
    optimizer.step()
    assert not handle.step_was_skipped
    # Their gradients are float32's where torch can; where not, they are divided in bfloat16's own dtype.
    grads = [torch.full((3,), 512.0, dtype=torch.bfloat16).to("cuda"), torch.full((2,), 6.0).to("cuda")]
    flags = check_and_scale_(grads, torch.full((), 2.0**-9, device="cuda"))
    assert [float(grad.cpu()[0]) for grad in grads] == [1.0, 6 / 512] and not any(float(flag.cpu()) for flag in flags)
    flag = non_finite([torch.full((3,), torch.nan, dtype=torch.bfloat16).to("cuda:1")], torch.device("cuda:0"))
    assert flag.device.index == 0 and float(flag.cpu()) == 1.0


def check_true_policies(policy: str) -> None:
    """Low precision weights step, with what is kept beside them on the device."""
    model = mlp().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrap(model, optimizer, policy)
    x, y = torch.randn(32, 8).to("cuda"), torch.randint(0, 4, (32,)).to("cuda")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach().cpu()))
    assert losses[-1] < losses[0] - 0.01, losses[::10]


def check_fast() -> None:
    """TF32 is switched on by `32-fast`, and is as before after `unwrap`."""
    owners = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [owner.fp32_precision for owner in owners]
    model = mlp().to("cuda")
    handle = wrap(model, None, "32-fast")
    assert [owner.fp32_precision for owner in owners] == ["tf32"] * 3
    assert "relative error" in str(handle.plan)
    model(torch.randn(4, 8).to("cuda")).sum().backward()
    handle.unwrap()
    assert [owner.fp32_precision for owner in owners] == before


def check_float8(recipe: str, rows: int) -> None:
    """Kernels of a device that has them get operands that they take, and gradients are near the true ones."""
    if find_spec("torchao") is None:
        return
    true, x = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 48)), torch.randn(rows, 64)
    model = put(true)
    wrap(model, None, "fp8-mixed", rules=[(nn.Linear, f"fp8,recipe={recipe}")])
    model(x.to("cuda")).square().mean().backward()
    true(x).square().mean().backward()
    for mine, its in zip(model.parameters(), true.parameters(), strict=True):
        # Three roundings to e4m3 or e5m2, 0.026 and 0.052 of the norm each.
        near(mine.grad, its.grad, tolerance=0.2)


def check_patience(form: dict[str, Any]) -> None:
    """Steps that are always skipped end in an error that names the module, also where the host does not read each."""
    model = mlp().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **form)
    wrap(model, optimizer, "16-mixed", loss_scale=LossScale(init_scale=1.0, max_consecutive_skips=3))
    x = torch.full((4, 8), torch.inf).to("cuda")
    try:
        for _ in range(210):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
    except NonFiniteError as error:
        assert "0" in str(error)  # the first linear layer's name
        return
    raise AssertionError("no NonFiniteError in 210 steps")


def check_unwrap(policy: str) -> None:
    """After `unwrap` a model on the device is as before."""
    model = mlp().to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [set(vars(module)) for module in model.modules()], set(vars(optimizer))
    params = [id(p) for p in model.parameters()]
    wrap(model, optimizer, policy)
    model(torch.randn(4, 8).to("cuda")).sum().backward()
    optimizer.step()
    unwrap(model)
    assert ([set(vars(module)) for module in model.modules()], set(vars(optimizer))) == before
    assert [id(p) for p in model.parameters()] == params


def check_frozen(policy: str) -> None:
    """Weights are cast once, and give what they gave."""
    model, x = mlp().to("cuda").eval(), torch.randn(4, 8).to("cuda")
    handle = wrap(model, None, policy)
    with torch.no_grad():
        true = model(x)
        with handle.frozen():
            assert torch.equal(model(x).cpu(), true.cpu())


def check_auto() -> None:
    """The plan knows the device, and which norms take a mix was tried on it."""
    plan = resolve(mlp().to("cuda"))
    assert str(plan.policy) == "bf16-mixed" and plan.placement("1").activations == "keep"
    assert ("LayerNorm", "float16") in backend_for("cuda").capability(torch.device("cuda:1")).mixed_norms


def check_watched() -> None:
    """The stand-in itself sees a wait, and operands on two devices: else nothing above would mean anything."""
    x = torch.randn(3).to("cuda:0")
    pretended.waits.clear()
    assert float(x.sum()) == float(x.cpu().sum())
    torch.ones(3).to("cuda:0", non_blocking=True)
    expect_waits(2)
    for broken in (lambda: x + torch.ones(3), lambda: x + torch.ones(3).to("cuda:1")):
        try:
            broken()
        except pretended.OnTwoDevices:
            continue
        raise AssertionError("operands on two devices were taken")


SPLITS = [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cpu", "cuda:0"), ("cuda:0", "cpu", "cuda:1")]

CHECKS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {}


def _list(function: Callable[..., None], *choices: list[Any]) -> None:
    for chosen in itertools.product(*choices):
        name = " ".join(str(one).replace("'", "") for one in (function.__name__.removeprefix("check_"), *chosen))
        CHECKS[name] = function, chosen


_list(check_watched)
_list(check_gradients, [*MIXED, "32-true"], list(MODELS))
_list(check_steps, MIXED, FORMS, ["mlp", "gpt"])
_list(check_overflow, FORMS, [("cuda:0", "cuda:0"), *SPLITS[:2]])
_list(check_overflow, FORMS[1:], SPLITS[2:])
_list(check_split, MIXED, FORMS, SPLITS)
_list(check_autocast_list)
_list(check_penalty, MIXED)
_list(check_bfloat16_weights)
_list(check_true_policies, ["bf16-true", "16-true", "16-true,rounding=stochastic"])
_list(check_fast)
_list(check_float8, list(RECIPES), [32, 5])
_list(check_patience, FORMS)
_list(check_unwrap, MIXED)
_list(check_frozen, MIXED)
_list(check_auto)


def main() -> None:
    """Run them all, and print what failed by name."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for name, (function, arguments) in CHECKS.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        torch.manual_seed(0)
        with pretended.cards():
            try:
                function(*arguments)
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc(limit=-8)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
