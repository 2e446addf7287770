"""Whatever is called, how and with what: the result is float32's within the dtype's rounding, gradients included."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fourfold import Found, assert_close, batch, compare, each_policy, grads
from torch import Tensor, nn

import wrapprec
from wrapprec import DtypeMismatchError, ScaleLeakError

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")


class Coder(nn.Module):
    """Is used through methods other than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8))
        self.scale = nn.Parameter(torch.full((8,), 0.7))
        self.decoder = nn.Linear(8, 8)

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.encoder(x)
        return out

    def decode(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z * self.scale)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


# Ways of calling


@each_policy
@pytest.mark.parametrize("way", ["call", "forward", "methods", "submodules", "dunder", "all"])
def test_every_way_of_calling_gives_the_same(policy: str, way: str) -> None:
    def run(model: Any) -> Found:
        x = batch(True)
        ways: dict[str, Callable[[], Tensor]] = {
            "call": lambda: model(x),
            "forward": lambda: model.forward(x),
            "methods": lambda: model.decode(model.encode(x)),
            "submodules": lambda: model.decoder(model.scale * model.encoder[3](F.gelu(model.encoder[:2](x)))),
            "dunder": lambda: type(model).__call__(model, x),
        }
        outs = [make() for name, make in ways.items() if way in (name, "all")]
        assert all(out.dtype == torch.float32 for out in outs)
        sum(out.square().mean() / 8 for out in outs).backward()
        return {**grads(model), "x": x.grad, "out": outs[0]}

    compare(Coder, run, policy)


@each_policy
def test_one_module_many_times_in_one_forward_is_true(policy: str) -> None:
    """The weight is lent once, and its gradients are added inside, where they are scaled."""

    class Repeats(Coder):
        def forward(self, x: Tensor) -> Tensor:
            first = self.encoder(x)
            second = self.encoder(torch.tanh(first))
            both: Tensor = self.decoder(first) + self.decoder(second) + self.encoder(x.flip(0))
            return both

    def run(model: Any) -> Found:
        x = batch(True)
        model(x).square().mean().div(8).backward()
        return {**grads(model), "x": x.grad}

    compare(Repeats, run, policy, slack=2)


@each_policy
def test_recursion_is_true(policy: str) -> None:
    """A tree of calls of the model by itself: only the outermost is the border."""

    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf, self.node = nn.Linear(8, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            if depth == 0:
                out: Tensor = torch.tanh(self.leaf(x))
                return out
            left, right = self(x, depth - 1), self.forward(-x, depth=depth - 1)
            out = torch.tanh(self.node(torch.cat([left, right], -1)))
            return out

    def run(model: Any) -> Found:
        x = batch(True)
        model(x).square().mean().backward()
        return {**grads(model), "x": x.grad}

    compare(Tree, run, policy, slack=2)


# A loss inside forward


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Classifies(nn.Module):
    def __init__(self, by_module: bool, returns: str) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1) if by_module else None
        self.returns = returns

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.body(x)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels) if self.criterion is None else self.criterion(logits, labels)
        if self.returns == "dataclass":
            return Output(loss, logits)
        return (loss, logits) if self.returns == "tuple" else {"loss": loss, "logits": logits}


@each_policy
@pytest.mark.parametrize("returns", ["dataclass", "tuple", "dict"])
@pytest.mark.parametrize("by_module", [True, False], ids=["module", "function"])
def test_loss_computed_inside_forward_is_true(policy: str, returns: str, by_module: bool) -> None:
    def run(model: Any) -> Found:
        x, labels = batch(True), torch.randint(0, 5, (6,))
        out = model(x, labels=labels)
        out = vars(out) if returns == "dataclass" else out
        loss, logits = (out["loss"], out["logits"]) if isinstance(out, dict) else out
        assert loss.dtype == torch.float32
        (loss / 8 + logits.square().mean() / 8).backward()
        return {**grads(model), "x": x.grad, "loss": loss}

    compare(lambda: Classifies(by_module, returns), run, policy)


def test_loss_inside_forward_of_float16_is_float32_and_costs_no_step() -> None:
    """In float16 the first scale, 65536, would be inf: the first step would be skipped."""
    torch.manual_seed(0)
    plain = Classifies(by_module=False, returns="tuple")
    mine = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    handle = wrapprec.wrap(mine, optimizer, "16-module")
    x, labels = batch(), torch.randint(0, 5, (6,))
    mine(x, labels)[0].backward()
    found = grads(mine)
    optimizer.step()
    assert handle.skipped_steps == 0 and handle.scale == 2**16
    plain(x, labels)[0].backward()
    assert_close(found, grads(plain), "16-module")


@each_policy
@pytest.mark.parametrize("kind", [nn.BCELoss, nn.KLDivLoss, nn.SmoothL1Loss])
def test_criterion_inside_computes_in_float32(policy: str, kind: Any) -> None:
    """BCELoss refuses to run under autocast, and a probability of 1 - 1e-4 is 1 in bfloat16."""
    seen: list[Any] = []
    options = {"reduction": "batchmean"} if kind is nn.KLDivLoss else {}

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.criterion = nn.Linear(8, 4), kind(**options)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            p = torch.sigmoid(self.head(x))
            out: Tensor = self.criterion(p.log() if kind is nn.KLDivLoss else p, y)
            return out

    def run(model: Any) -> Found:
        model.criterion.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        x, y = batch(True), torch.rand(6, 4)
        loss = model(x, y)
        assert loss.dtype == torch.float32
        loss.div(8).backward()
        return {**grads(model), "x": x.grad, "loss": loss}

    compare(Scores, run, policy, slack=2)
    assert seen[0] == torch.float32 and len(seen) == 2


# Modes


@each_policy
def test_forwards_without_gradients_between_training_steps_change_nothing(policy: str) -> None:
    """Dropout and batch statistics make a forward in the wrong mode show."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 4))

    def run(model: Any) -> Found:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        handle = wrapprec.handle_of(model)
        if handle is not None:
            handle.attach(optimizer)
        found: Found = {}
        for step in range(4):
            x = batch(True)
            with torch.no_grad():
                model.eval()
                still = model(x)
                assert not still.requires_grad
                model.train()
            with torch.inference_mode():
                model.eval()
                assert model(x).is_inference()
                model.train()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            with torch.no_grad():
                model.train(False)(x)
                model.train()
            optimizer.step()
            found |= {f"x{step}": x.grad, f"still{step}": still}
        return {**found, **{k: v for k, v in model.state_dict().items() if v.dtype.is_floating_point}}

    # Four steps, each rounded as one forward and backward is.
    compare(make, run, policy, slack=4)


# User autograd Functions


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.t(), x.t() @ grads[0]


def _with_custom(**options: Any) -> Any:
    class Custom(torch.autograd.Function):
        forward = staticmethod(torch.amp.custom_fwd(Product.forward, device_type="cpu", **options))
        backward = staticmethod(torch.amp.custom_bwd(Product.backward, device_type="cpu"))

    return Custom


class Applies(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.body, self.function = nn.Linear(8, 8), function
        self.weight = nn.Parameter(torch.randn(8, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function.apply(self.body(x), self.weight)
        return out


def _applied(model: Any) -> Found:
    x = batch(True)
    out = model(x)
    out.square().mean().backward()
    return {**grads(model), "x": x.grad, "out": out}


@each_policy
@pytest.mark.parametrize("options", [{}, {"cast_inputs": torch.float32}], ids=["as autocast", "float32"])
def test_users_function_with_custom_fwd_is_true(policy: str, options: Any) -> None:
    compare(lambda: Applies(_with_custom(**options)), _applied, policy)


@each_policy
def test_users_plain_function_is_true_or_refused_as_under_autocast(policy: str) -> None:
    """Autocast gives it a float32 weight and casts in its forward only: torch's own error, in its backward."""
    if policy.endswith("module"):
        compare(lambda: Applies(Product), _applied, policy)
        return
    with pytest.raises(RuntimeError, match="same dtype"):
        compare(lambda: Applies(Product), _applied, policy)
    plain = Applies(Product)
    with torch.autocast("cpu", dtype=torch.bfloat16 if policy.startswith("bf") else torch.float16):
        out = plain(batch())
    with pytest.raises(RuntimeError, match="same dtype"):
        out.sum().backward()


# In place


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        h = self.second(h)
        h += x
        h = h.clone()
        h.index_put_((torch.tensor([0, 1]),), h.new_ones(8), accumulate=True)
        h[:, 0] = 2.0
        h.mul_(0.5).add_(x, alpha=0.1)
        return F.relu_(h) * 1.0


@each_policy
def test_activations_written_in_place_are_true(policy: str) -> None:
    def run(model: Any) -> Found:
        x = batch(True)
        out = model(x)
        out *= 0.5  # on the output, too
        out.square().mean().backward()
        return {**grads(model), "x": x.grad, "out": out}

    compare(Writes, run, policy)


@each_policy
def test_write_of_the_first_layer_into_the_input_reaches_the_callers_tensor(policy: str) -> None:
    """Under module casting the layer gets a copy."""

    def run(model: Any) -> Found:
        x = batch()
        out = model(x)
        assert (x >= 0).all()
        out.square().mean().backward()
        return {**grads(model), "x": x, "out": out}

    compare(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)), run, policy)


# Kinds of tensors


@each_policy
def test_channels_last_is_kept_and_true(policy: str) -> None:
    class Convolves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.head = nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.relu(self.norm(self.body(x))))
            return out

    def run(model: Any) -> Found:
        model.to(memory_format=torch.channels_last)
        x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = model(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        (out.square().mean() / 8).backward()
        assert model.head.weight.grad.is_contiguous(memory_format=torch.channels_last)
        assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)
        return {**grads(model), "x": x.grad, "out": out}

    compare(Convolves, run, policy, slack=2)


class Filters(nn.Module):
    """A layer that works on the spectrum."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.raises = raises

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        spectrum = torch.fft.rfft(h.float() if self.raises else h) * self.filter
        return self.head(torch.fft.irfft(spectrum, n=8)), spectrum


def _filtered(model: Any) -> Found:
    x = batch(True)
    out, spectrum = model(x)
    assert spectrum.dtype == torch.complex64
    (out.square().mean() / 8 + spectrum.abs().square().mean() / 64).backward()
    return {**grads(model), "x": x.grad, "spectrum": spectrum}


@each_policy
def test_fourier_layer_is_true(policy: str) -> None:
    compare(lambda: Filters(raises=True), _filtered, policy)


@each_policy
def test_fourier_transform_of_what_has_no_complex_half_is_float32_or_refused(policy: str) -> None:
    """Autocast raises the operands of torch.fft; without it, torch has no transform of bfloat16, nor float16 here."""
    if policy.endswith("mixed"):
        compare(lambda: Filters(raises=False), _filtered, policy)
        return
    with pytest.raises(DtypeMismatchError) as caught:
        compare(lambda: Filters(raises=False), _filtered, policy)
    text = str(caught.value)
    assert "Received: Unsupported dtype" in text and "Filters" in text and "wrapprec.float32()" in text


@each_policy
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_integers_booleans_and_quantised_tensors_pass_through_as_they_are(policy: str) -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.table = nn.Linear(8, 8), nn.Embedding(5, 8)

        def forward(self, x: Tensor, given: dict[str, Tensor]) -> Any:
            h = self.body(x) * given["bool"] + self.table(given["int"])
            return h + given["quantised"].dequantize(), {**given, "counted": given["int"] + 1}

    def run(model: Any) -> Found:
        x = batch(True)
        quantised = torch.quantize_per_tensor(torch.randn(6, 8), 0.1, 0, torch.qint8)
        given = {
            "int": torch.randint(0, 5, (6,)),
            "bool": torch.rand(6, 8) > 0.5,
            "quantised": quantised,
            "byte": torch.arange(6, dtype=torch.uint8),
        }
        out, back = model(x, given)
        assert all(back[name] is tensor for name, tensor in given.items()) and back["counted"].dtype == torch.int64
        out.square().mean().backward()
        return {**grads(model), "x": x.grad, "out": out}

    compare(Passes, run, policy)


class Spreads(nn.Module):
    """A graph convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, graph: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return graph @ self.body(x), graph


@each_policy
def test_sparse_inputs_and_outputs_are_true(policy: str) -> None:
    """A gradient with respect to a sparse input is sparse: it crosses the border on its values."""

    def run(model: Any) -> Found:
        x, values = batch(True), torch.rand(6, requires_grad=True)
        indices = torch.stack([torch.arange(6), torch.arange(6).flip(0)])
        graph = torch.sparse_coo_tensor(indices, values, (6, 6), is_coalesced=True, check_invariants=False)
        out, given = model(graph.detach(), x)
        assert given.is_sparse
        back = model(graph, x)[1]
        (out.square().mean() + torch.sparse.sum(back * 0.3)).backward()
        return {**grads(model), "x": x.grad, "values": values.grad, "out": out, "graph": given}

    compare(Spreads, run, policy)


# Backward inside forward


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
@pytest.mark.parametrize("after", [0, 10])
def test_backward_inside_forward_is_refused_at_any_time(policy: str, after: int) -> None:
    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.alone = nn.Linear(8, 4), False

        def forward(self, x: Tensor) -> Tensor:
            loss: Tensor = self.body(x).float().square().mean()
            if self.alone:
                loss.backward()
            return loss

    model = Trains()
    wrapprec.wrap(model, policy=policy)
    for _ in range(after):
        model(batch()).backward()
    model.zero_grad()
    model.alone = True
    with pytest.raises(ScaleLeakError, match="call backward outside forward"):
        model(batch())
    assert model.body.weight.grad is None
