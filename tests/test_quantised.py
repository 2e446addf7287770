"""Quantised weights: values and gradients against the dequantised weights in float64, and what is (not) quantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import wrapprec
from wrapprec import CaptureError, DtypeMismatchError, PolicyError, WrapprecWarning
from wrapprec.lowbit import products

pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:float16 on a CPU"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]

FORMS = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
each_form = pytest.mark.parametrize("form", FORMS)

# Dettmers et al., QLoRA (2023), appendix E.
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


class Lora(nn.Module):
    """A frozen layer, and a trained product of two small matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Net(nn.Module):
    """Two adapted layers with a norm between; the first may run in a checkpoint.

    Rows of 48 and of 64 elements: blocks that straddle them, and blocks that do not.
    """

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 16)
        self.requires_grad_(False)
        self.first, self.last = Lora(self.first), Lora(self.last)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) if self.reentrant is None else checkpoint(self.first, x, use_reentrant=self.reentrant)
        return self.last(torch.tanh(self.norm(h)))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    loss = (model(x) ** 2).mean()
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert x.grad is not None
    return {"loss": loss.detach(), "x": x.grad, **found}


def in_float64(model: nn.Module) -> Any:
    """The model with the numbers that its quantised weights mean, in float64: what unwrapping a copy gives."""
    plain = copy.deepcopy(model)
    wrapprec.unwrap(plain)
    return plain.double()


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, true in want.items():
        assert true.norm() > 0
        off = (got[name].double() - true).norm() / true.norm()
        assert off <= tolerance, f"{name}: {off:.2e}"


# Eight roundings of the compute dtype in the norm of a tensor, as in sidebyside.TOLERANCE: inputs, weights, outputs and
# gradients are rounded once in each of two layers. Gradients through the wrong orientation, a lost block or the FP32
# weights instead of the quantised ones (10 % off) are far out.
BF16, F16, F32 = 8 * 2**-8, 8 * 2**-11, 1e-5


# With rows of 48, 96 and 32 elements bitsandbytes' kernel for CPUs takes the wrong blocks' scales.
@pytest.mark.parametrize("shape", [(40, 64), (40, 48), (40, 96), (40, 32), (5, 13), (3, 1)])
def test_nf4_is_the_nearest_of_sixteen_values_in_each_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    true = model.weight.detach().double().flatten()
    wrapprec.wrap(model, policy="nf4").unwrap()
    got = model.weight.double().flatten()
    table = torch.tensor(NF4, dtype=torch.float64)
    for start in range(0, true.numel(), 64):
        block = true[start : start + 64]
        steps = table * block.abs().max()
        nearest = steps[(block.unsqueeze(1) - steps).abs().argmin(dim=1)]
        # Float32's rounding of the product of scale and value.
        torch.testing.assert_close(got[start : start + 64], nearest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [64, 48])
def test_products_are_those_of_the_sixteen_values(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(width, 40).requires_grad_(False)
    true = model.weight.detach().double().reshape(-1)
    wrapprec.wrap(model, policy="params=nf4,compute=float32")
    steps = torch.tensor(NF4, dtype=torch.float64) * true.reshape(-1, 64).abs().amax(dim=1, keepdim=True).unsqueeze(1)
    blocks = steps.expand(-1, 64, -1)
    index = (true.reshape(-1, 64, 1) - steps).abs().argmin(dim=-1, keepdim=True)
    weight = blocks.gather(-1, index).reshape(40, width)
    x = torch.randn(3, width, requires_grad=True)
    out = model(x)
    out.sum().backward()
    want = x.detach().double() @ weight.T + model.bias
    assert (out.double() - want).norm() <= F32 * want.norm()
    assert x.grad is not None
    assert (x.grad.double() - weight.sum(0)).norm() <= F32 * weight.sum(0).norm() * 3


@settings(max_examples=50)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(-30, 30), st.integers(0, 2**31))
def test_int8_is_the_nearest_of_127_steps_in_each_row_at_any_magnitude(
    rows: int, columns: int, exponent: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(columns, rows, bias=False).requires_grad_(False)
    with torch.no_grad():
        model.weight.normal_().mul_(10.0**exponent)
        model.weight[0].zero_()
    true = model.weight.detach().double()
    small = true.numel() <= 2
    wrapprec.wrap(model, policy=wrapprec.Policy.parse("32-true" if small else "int8")).unwrap()
    step = true.abs().amax(dim=1, keepdim=True) / 127
    # Half a step, and what the kernel's float16 rounding of 127 steps may add: 127 * 2**-11 of one.
    assert ((model.weight.double() - true).abs() <= (0.5 + 127 * 2**-11) * step + 1e-300).all()


def by_hand(weight: Any) -> Tensor:
    """The numbers of a packed weight in float64, element by element, without a kernel of bitsandbytes."""
    if weight.dtype is torch.int8:
        return weight.detach().double() * weight.SCB.double().unsqueeze(1) / 127
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        outer = state.state2.absmax.double().repeat_interleave(256)[: len(scales)]
        scales = state.state2.code.double()[scales.long()] * outer + state.offset.double()
    packed, count = weight.detach().flatten().long(), state.shape.numel()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count]
    numbers = state.code.double()[codes] * scales.double().repeat_interleave(64)[:count]
    return numbers.reshape(state.shape)


@settings(max_examples=25)
@given(st.sampled_from(FORMS), st.integers(2, 80), st.integers(2, 200), st.integers(0, 5), st.integers(0, 2**31))
def test_layers_of_any_size_multiply_by_what_they_store(form: str, outs: int, ins: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(ins, outs).requires_grad_(False)
    handle = wrapprec.wrap(model, policy=f"params={form},compute=float32")
    weight = by_hand(model.weight)
    x = torch.randn(rows, ins, requires_grad=True)
    out = model(x)
    want = x.detach().double() @ weight.T + model.bias.double()
    assert (out.double() - want).norm() <= F32 * want.norm()
    grad = torch.randn(rows, outs)
    out.backward(grad)
    true = grad.double() @ weight
    assert x.grad is not None and (x.grad.double() - true).norm() <= F32 * true.norm()
    handle.unwrap()
    assert (model.weight.double() - weight).norm() <= 1e-6 * weight.norm()


@each_form
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_are_those_of_the_dequantised_weights(form: str, reentrant: bool | None) -> None:
    model = net(reentrant=reentrant)
    wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), form)
    reference = in_float64(model)
    reference.reentrant = None
    x = torch.randn(3, 5, 48)
    assert_close(gradients(model, x), gradients(reference, x.double()), BF16)


@pytest.mark.parametrize("form", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize(
    ("rest", "tolerance", "scale"),
    [
        ("compute=float16,output=float32", F16, 65536.0),
        ("compute=float16,output=float32,casting=module", F16, 65536.0),
        ("compute=bfloat16,output=float32,casting=module", BF16, 1.0),
        ("compute=float32", F32, 1.0),
    ],
)
def test_every_casting_and_scale_gives_true_gradients(form: str, rest: str, tolerance: float, scale: float) -> None:
    model = net()
    handle = wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), f"params={form},{rest}")
    assert handle.scale == scale
    x = torch.randn(3, 5, 48)
    assert_close(gradients(model, x), gradients(in_float64(model), x.double()), tolerance)


@each_form
def test_training_moves_the_adapters_and_nothing_else(form: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # the frozen ones too: they have no gradient
    with wrapprec.wrap(model, optimizer, form):
        before = {name: t.clone() for name, t in model.state_dict().items()}
        gradients(model, torch.randn(3, 48))
        optimizer.step()
        moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {f"{layer}.{part}.weight" for layer in ("first", "last") for part in ("down", "up")}


@each_form
def test_a_step_is_the_hand_written_one(form: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    wrapprec.wrap(model, optimizer, form)
    reference = in_float64(model)
    x = torch.randn(3, 48)
    gradients(model, x)
    optimizer.step()
    for name, grad in gradients(reference, x.double()).items():
        if name in dict(reference.named_parameters()):
            want = reference.get_parameter(name) - 0.1 * grad
            got = model.get_parameter(name).double()
            assert (got - want).norm() <= BF16 * (0.1 * grad).norm() + 1e-6 * want.norm()


@each_form
def test_eval_and_frozen_give_the_same_numbers_as_training_and_keep_them_trainable(form: str) -> None:
    # bitsandbytes' own layer repacks 4-bit weights in eval on a CPU, and passes no gradients from then on.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).requires_grad_(False)
    handle = wrapprec.wrap(model, policy=form)
    x = torch.randn(3, 64)
    first = model(x)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), first)
    with handle.frozen():
        assert torch.equal(model(x), first)
    assert torch.equal(model(x), first)
    model.train()
    inside = x.clone().requires_grad_()
    model(inside).sum().backward()
    want = torch.ones(3, 32, dtype=torch.float64) @ in_float64(model)[1].weight @ in_float64(model)[0].weight
    assert inside.grad is not None
    assert (inside.grad.double() - want).norm() <= BF16 * want.norm()


def test_a_trained_bias_keeps_its_dtype_and_gets_its_gradient() -> None:
    # bitsandbytes' own layer casts the bias in place.
    model = nn.Sequential(nn.Linear(48, 8))
    model[0].weight.requires_grad_(False)
    wrapprec.wrap(model, torch.optim.SGD([model[0].bias], lr=0.1), "nf4")
    model(torch.randn(2, 5, 48)).sum().backward()
    assert model[0].bias.dtype is torch.float32
    assert torch.equal(model[0].bias.grad, torch.full((8,), 10.0))


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (2, 3, 4, 48)])
@each_form
def test_inputs_of_any_number_of_dimensions(form: str, shape: tuple[int, ...]) -> None:
    model = nn.Linear(48, 8).requires_grad_(False)
    wrapprec.wrap(model, policy=form)
    x = torch.randn(shape, requires_grad=True)
    out = model(x)
    want = in_float64(model)(x.double())
    assert out.shape == want.shape
    assert (out.double() - want).norm() <= BF16 * want.norm()
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@each_form
def test_a_forward_in_a_float32_island_multiplies_in_float32(form: str) -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 8)

        def forward(self, x: Tensor) -> Tensor:
            with wrapprec.float32():
                return self.layer(x)

    model = Island().requires_grad_(False)
    wrapprec.wrap(model, policy=form)
    x = torch.randn(3, 48)
    want = in_float64(model).layer(x.double())
    assert (model(x).double() - want).norm() <= F32 * want.norm()


def test_inputs_of_the_wrong_size_and_dtype_are_refused() -> None:
    model = nn.Sequential(nn.Linear(48, 8)).requires_grad_(False)
    wrapprec.wrap(model, policy="nf4")
    with pytest.raises(RuntimeError, match=r"\[2, 8\] X \[48, 8\]"):
        model(torch.randn(2, 8))  # bitsandbytes takes the weight for a transposed one here
    with pytest.raises(DtypeMismatchError) as caught:
        model(torch.ones(2, 48, dtype=torch.uint8))
    assert str(caught.value) == (
        "Expected an input in float32, bfloat16 or float16 to a layer with quantised weights.\n"
        "Received: an input in uint8; code around it may cast activations to `weight.dtype`\n"
        'Where: "0" (Linear4bit)\n'
        'Remedy: cast to the dtype of the activations, or add rules=[Rule("0", "bf16-mixed")]'
    )
    with pytest.raises(DtypeMismatchError, match="an input in float64"):
        model(torch.ones(2, 48, dtype=torch.float64))


@each_form
@pytest.mark.parametrize(
    "transform",
    [
        lambda model, x: torch.func.grad(lambda v: model(v).square().sum())(x),
        lambda model, x: torch.func.vmap(torch.func.grad(lambda v: model(v).square().sum()))(x),
        lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_transforms_differentiate_through_quantised_weights(form: str, transform: Callable[..., Tensor]) -> None:
    model = nn.Sequential(nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).requires_grad_(False)
    wrapprec.wrap(model, policy=form)
    x = torch.randn(3, 48)
    want = transform(in_float64(model), x.double())
    assert (transform(model, x).double() - want).norm() <= BF16 * want.norm()


@each_form
def test_gradient_penalties_go_through_quantised_weights(form: str) -> None:
    model = nn.Sequential(nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).requires_grad_(False)
    wrapprec.wrap(model, policy=form)

    def penalty(model: Any, x: Tensor) -> Tensor:
        x.requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    x = torch.randn(3, 48)
    want = penalty(in_float64(model), x.double())
    # A second derivative: twice as many roundings.
    assert (penalty(model, x.clone()).double() - want).norm() <= 2 * BF16 * want.norm()


@pytest.mark.parametrize("form", ["nf4-dq", "int8", "int8-training"])
def test_compiled_as_one_graph(form: str) -> None:
    model = net()
    wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), form)
    x = torch.randn(3, 48)
    want = gradients(model, x)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, want[name.removeprefix("_orig_mod.")], rtol=BF16, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_encoder_layers_of_torch_leave_their_fast_path(form: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).requires_grad_(False).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fast = [m.activation_relu_or_gelu for m in model.layers]
    with wrapprec.wrap(model, policy=form), torch.no_grad():
        got = model(x, src_key_padding_mask=mask)
        want = in_float64(model)(x.double(), src_key_padding_mask=mask)
    # What is padded is not defined. A norm divides by the deviation of what came in rounded.
    assert (got.double() - want)[~mask].norm() <= 2 * BF16 * want[~mask].norm()
    assert [m.activation_relu_or_gelu for m in model.layers] == fast


# Embeddings


@pytest.mark.parametrize("form", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
@pytest.mark.parametrize("width", [64, 128, 24])
def test_embeddings_are_quantised_by_a_rule_of_their_own(form: str, width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, width), nn.Linear(width, 4))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, "bf16-mixed", rules=[("0", form)])
    assert [handle.plan.placement(name).precision.param_dtype for name in ("0", "1")] == [form, torch.float32]
    ids = torch.randint(50, (3, 7))
    plain = in_float64(model)
    assert torch.equal(model[0](ids), plain[0](ids).float())
    assert model[0](ids[:0]).shape == (0, 7, width)
    with pytest.raises(IndexError):
        model[0](torch.tensor([50]))
    model(ids).square().mean().backward()
    plain(ids).square().mean().backward()
    want = plain[1].weight.grad
    assert (model[1].weight.grad.double() - want).norm() <= BF16 * want.norm()


def test_embeddings_are_lent_low_under_module_casting() -> None:
    model = nn.Sequential(nn.Embedding(50, 64)).requires_grad_(False)
    wrapprec.wrap(model, policy="bf16-module", rules=[("0", "params=nf4,compute=bf16,output=bf16,casting=module")])
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    model(torch.tensor([1]))
    assert seen == [torch.bfloat16]


# What is quantised, and the plan


def test_the_plan_says_what_is_stored_and_why_the_rest_is_not() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "tok": nn.Embedding(8, 64),
            "fc": nn.Linear(64, 4),
            "other": Mine(4, 4),
            "head": nn.Linear(64, 8),
            "wide": nn.Linear(4, 4).double(),
            "norm": nn.LayerNorm(4),
            "conv": nn.Conv1d(2, 2, 1),
        }
    ).requires_grad_(False)
    model["head"].weight = model["tok"].weight
    model["adapter"] = nn.Linear(4, 4)
    plan = wrapprec.resolve(model, "nf4")
    stored = {p.name: p.precision.param_dtype for p in plan.placements if isinstance(p.precision.param_dtype, str)}
    assert stored == {"fc": "nf4"}
    assert {p.name: p.notes for p in plan.placements if p.notes} == {
        "tok": ("not nf4: an embedding needs a rule of its own",),
        "other": ("not nf4: only torch.nn.Linear is, not Mine",),
        "head": ("not nf4: its weight is shared with another module",),
        "wide": ("not nf4: its weight is float64",),
        "adapter": ("not nf4: it is trained, beside frozen layers",),
    }
    assert wrapprec.Plan.from_dict(plan.to_dict()) == plan


def test_parts_are_quantised_by_a_rule_while_the_rest_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(48, 32), nn.ReLU()), "head": nn.Linear(32, 4)})
    model["encoder"].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, "bf16-mixed", rules=[("encoder", "nf4")])
    assert [model["encoder"][0].weight.dtype, model["head"].weight.dtype] == [torch.uint8, torch.float32]
    x = torch.randn(3, 48)
    plain = in_float64(model)
    model["head"](model["encoder"](x)).square().mean().backward()
    plain["head"](plain["encoder"](x.double())).square().mean().backward()
    want = plain["head"].weight.grad
    assert (model["head"].weight.grad.double() - want).norm() <= BF16 * want.norm()


def test_activations_are_not_cast_at_the_border_of_quantised_weights() -> None:
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 32), nn.Linear(32, 4)).requires_grad_(False)
    wrapprec.wrap(model, policy="bf16-mixed", rules=[("1", "nf4")])
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    model(torch.randn(2, 48))
    assert seen == [torch.bfloat16] * 3


def test_a_plan_that_stores_nothing_so_warns() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1))
    with pytest.warns(WrapprecWarning, match="no weight can be stored so: the plan says why"):
        wrapprec.wrap(model, policy="fp4-dq").unwrap()


def test_the_plan_names_the_format_that_layers_of_bitsandbytes_came_in() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).requires_grad_(False)
    model[0] = bitsandbytes.nn.Linear4bit(64, 64, quant_type="fp4", compress_statistics=False).to("cpu")
    for policy, last in (("bf16-mixed", torch.float32), ("nf4", "nf4")):
        with wrapprec.wrap(model, policy=policy) as handle:
            stored = [handle.plan.placement(name).precision.param_dtype for name in ("0", "1")]
            assert stored == ["fp4", last]
            assert handle.plan.placement("0").notes == ("stored as fp4 already",)
            assert model(torch.randn(2, 64)).shape == (2, 8)
        assert type(model[0]) is bitsandbytes.nn.Linear4bit and type(model[1]) is nn.Linear


@each_form
def test_recorders_that_lose_the_scales_are_refused(form: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8)).requires_grad_(False)
    wrapprec.wrap(model, policy=form)
    with pytest.raises(CaptureError) as caught:
        torch.export.export(model, (torch.randn(2, 64),))
    assert str(caught.value) == (
        "Expected a quantised weight with its scales.\n"
        "Received: a tensor that stands in for one and has none: torch.export, torch.func.functional_call or"
        " nn.DataParallel put it there\n"
        'Where: "0" (' + type(model[0]).__name__ + ")\n"
        "Remedy: call wrapprec.unwrap(model) before, on a copy.deepcopy where the model is still needed"
    )


def test_bfloat16_weights_are_quantised_and_come_back_in_bfloat16() -> None:
    model = nn.Linear(64, 8).requires_grad_(False).bfloat16()
    with wrapprec.wrap(model, policy="nf4"):
        assert model.weight.dtype is torch.uint8
    assert model.weight.dtype is torch.bfloat16


# Trained weights


def test_a_weight_that_the_optimizer_trains_is_refused() -> None:
    model = nn.Sequential(nn.Linear(48, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.state_dict()
    with pytest.raises(PolicyError) as caught:
        wrapprec.wrap(model, optimizer, "nf4")
    assert str(caught.value) == (
        "Expected frozen weights to store as nf4.\n"
        "Received: a weight that requires grad and that the optimizer trains\n"
        'Where: "0" (Linear)\n'
        "Remedy: call model.requires_grad_(False) before adapters are added and the optimizer is built, or give what"
        ' trains a rule: rules=[Rule("0", "bf16-mixed")]'
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert wrapprec.handle_of(model) is None


def test_a_rule_for_a_trained_layer_itself_is_refused_beside_frozen_ones() -> None:
    model = net()
    with pytest.raises(PolicyError, match=r'Where: "last.up"'):
        wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), "nf4", rules=[("last.up", "fp4")])
    assert type(model.first.base) is nn.Linear


def test_weights_that_no_optimizer_holds_are_quantised_and_attaching_theirs_is_refused() -> None:
    model = nn.Sequential(nn.Linear(48, 4))
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, policy="nf4")
    for optimizer in (mine, torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(PolicyError, match="Expected frozen weights to store as nf4"):
            handle.attach(optimizer)
    model.eval()(torch.randn(2, 48))
    with torch.no_grad():
        model.train()(torch.randn(2, 48))
    with pytest.warns(WrapprecWarning, match="a weight that required grad when it was stored as nf4"):
        model(torch.randn(2, 48))
    model(torch.randn(2, 48))


def test_an_optimizer_of_everything_is_no_stranger() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, policy="nf4")
    handle.attach(optimizer)  # warnings are errors here


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(48, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[1].weight[0, 0] = float("nan")
    with pytest.raises(PolicyError, match="inf or nan, which would spread"):
        wrapprec.wrap(model, policy="nf4")
    assert type(model[0]) is nn.Linear and model[0].weight.dtype is torch.float32


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_loaded", {})
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    model = nn.Linear(48, 4).requires_grad_(False)
    with pytest.raises(PolicyError, match=r"Remedy: pip install 'wrapprec\[bitsandbytes\]'"):
        wrapprec.wrap(model, policy="nf4")
    assert wrapprec.handle_of(model) is None


# int8-training


def rounded(weight: Tensor) -> Tensor:
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / step).round() * step


def test_int8_training_multiplies_rounded_weights_and_passes_the_gradient_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4))
    plain: Any = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapprec.wrap(model, optimizer, "int8-training")
    x = torch.randn(3, 5, 48)
    for _ in range(2):  # the second with gradients and changed weights there already
        for mine, true in zip(model.parameters(), plain.parameters(), strict=True):
            true.data = mine.detach().double()
        h = x.double()
        for index, layer in enumerate(plain):
            if isinstance(layer, nn.Linear):
                weight = layer.weight + (rounded(layer.weight) - layer.weight).detach()
                h = functional.linear(h, weight, layer.bias)
            else:
                h = plain[index](h)
        plain.zero_grad()
        h.square().mean().backward()
        optimizer.zero_grad(set_to_none=False)
        out = model(x)
        out.square().mean().backward()
        assert (out.double() - h).norm() <= BF16 * h.norm()
        for mine, true in zip(model.parameters(), plain.parameters(), strict=True):
            assert (mine.grad.double() - true.grad).norm() <= BF16 * true.grad.norm()
        optimizer.step()


def test_int8_training_keeps_parameters_and_checkpoints_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(48, 16), nn.Linear(16, 4))
    params, state = list(model.parameters()), model.state_dict()
    handle = wrapprec.wrap(model, torch.optim.SGD(params, lr=0.1), "int8-training")
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    x = torch.randn(3, 48)
    model.eval()
    with torch.no_grad():  # where bitsandbytes' own layer fails on CPUs
        want = model(x)
    with handle.frozen():
        assert torch.equal(model(x), want)
