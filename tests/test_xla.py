"""The core on an XLA device: torch_xla's, of which `PJRT_DEVICE=CPU` gives a real one on any machine."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wrapprec
from wrapprec import Policy, Rule, unwrap, wrap
from wrapprec.backends.counted import Counted
from wrapprec.backends.select import auto_policy, backend_for
from wrapprec.backends.xla import XlaBackend
from wrapprec.lowbit.words import combine, round_by_chance, split

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
BF16 = ["bf16-mixed", "bf16-module"]
"""The float16 policies resolve to the same plans (tested), and compiling takes seconds."""

if importlib.util.find_spec("torch_xla") is None:
    pytest.skip("torch_xla is not installed: tox -e xla", allow_module_level=True)

os.environ.setdefault("PJRT_DEVICE", "CPU")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_xla
    import torch_xla.debug.metrics as met
    from torch_xla.amp import syncfree
    from torch_xla.utils.checkpoint import checkpoint

pytestmark = [
    # Said for every float16 policy; the test that counts it looks for itself.
    pytest.mark.filterwarnings("ignore:float16 is no type of XLA devices:UserWarning"),
]


@pytest.fixture
def xla() -> torch.device:
    return torch_xla.device()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model of 2 layers; `forward` gives logits, 4 x 16 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(32, 16), nn.Embedding(16, 16)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        return F.linear(self.norm(self.blocks(x)), self.token.weight)

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 32, (4, 17))
        return tokens[:, :-1], tokens[:, 1:]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * 9, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(8, 3, 8, 8), torch.randint(0, 32, (8,))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    steps: int,
    call: Callable[..., Any] | None = None,
) -> tuple[list[float], list[Tensor]]:
    """The plain loop of an XLA script: the losses, and the gradients of the first step on the host."""
    losses, first = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(call or model, *batch)
        loss.backward()
        first = [p.grad.clone() for p in model.parameters()] if first is None else first
        optimizer.step()
        torch_xla.sync()
        losses.append(loss.detach())
    return [float(loss) for loss in losses], [grad.cpu() for grad in first]


def by_hand(kind: type[GPT] | type[ConvNet], steps: int = 1) -> tuple[nn.Module, Any, list[float], list[Tensor]]:
    """A model and a batch on the host, and what plain float32 makes of them there with SGD."""
    torch.manual_seed(0)
    model, batch = kind(), kind.batch()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    losses, first = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(reference, *batch)
        loss.backward()
        first = [p.grad.clone() for p in reference.parameters()] if first is None else first
        optimizer.step()
        losses.append(loss.item())
    return model, batch, losses, first


def autocast_gradients(kind: type[GPT] | type[ConvNet]) -> list[Tensor]:
    """What torch.autocast makes of the same model and batch in bfloat16 on the host: the error that rounding costs."""
    torch.manual_seed(0)
    model, batch = kind(), kind.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model, *batch).backward()
    return [p.grad for p in model.parameters()]


def assert_as_near(gradients: list[Tensor], trues: list[Tensor], peers: list[Tensor]) -> None:
    """As far from float32's gradients as rounding takes torch.autocast: chance needs the factor 2, and XLA on a CPU
    rounds sums over the batch to bfloat16 more often than oneDNN does, hence four units in the last place."""
    for grad, true, peer in zip(gradients, trues, peers, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - true).norm() <= 2 * (peer - true).norm() + 4 * 2**-8 * true.norm() + 1e-6


def to(device: torch.device, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].to(device), batch[1].to(device)


def dots(text: str) -> list[str]:
    """The result types of the matrix products and convolutions in an HLO module's text."""
    return re.findall(r"= (\w+)\[[\d,]*\]\S* (?:dot|convolution)\(", text)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [GPT, ConvNet])
def test_training_follows_float32_with_gradients_near_its_own(xla: torch.device, kind: Any, policy: str) -> None:
    model, batch, losses, gradients = by_hand(kind, steps=8)
    model = model.to(xla)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrap(model, optimizer, policy)
    mine, first = train(model, optimizer, to(xla, batch), steps=8)
    assert_as_near(first, gradients, autocast_gradients(kind))
    # The curves part as the errors of the steps add up; a loss that does not fall would be 10 times as far off.
    assert mine == pytest.approx(losses, rel=0.03)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [GPT, ConvNet])
def test_compiled_program_computes_in_bfloat16(xla: torch.device, kind: Any, policy: str) -> None:
    # A missing cast would go unseen in the results: XLA promotes mixed operands to float32 without a word.
    model, batch, _, _ = by_hand(kind)
    model = model.to(xla)
    batch = to(xla, batch)
    wrap(model, None, policy)
    torch_xla.sync()
    loss = loss_of(model, *batch)
    loss.backward()
    found = dots(torch_xla._XLAC._get_xla_tensors_hlo([loss, *(p.grad for p in model.parameters())]))
    layers = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    assert len(found) >= 3 * layers - 1  # forward, and both gradients: the first layer's input may need none
    assert set(found) == {"bf16"}


@pytest.mark.parametrize("policy", BF16)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_norm_between_convolutions_leaves_all_their_products_in_bfloat16(
    xla: torch.device, kind: Any, policy: str
) -> None:
    # torch_xla runs these norms on bfloat16, and gives the layer before a gradient that is float32 in the program.
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), kind(4, affine=True), nn.Conv2d(4, 2, 3)).to(xla)
    x = torch.randn(2, 2, 6, 6).to(xla)
    torch_xla.sync()
    wrap(model, None, policy)
    loss = model(x).square().sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(grad.dtype == torch.float32 for grad in gradients)
    found = dots(torch_xla._XLAC._get_xla_tensors_hlo([loss, *gradients]))
    # Of two convolutions: forward, and the gradients of weight and input.
    assert len(found) == 6 and set(found) == {"bf16"}


def test_program_without_wrap_computes_in_float32(xla: torch.device) -> None:
    # So the test above can fail.
    model, batch, _, _ = by_hand(GPT)
    loss = loss_of(model.to(xla), *to(xla, batch))
    assert set(dots(torch_xla._XLAC._get_xla_tensors_hlo([loss]))) == {"f32"}


@pytest.mark.parametrize("policy", BF16)
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (GPT, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (GPT, lambda p: torch.optim.AdamW(p, foreach=True)),
        (GPT, lambda p: syncfree.SGD(p, lr=0.1, momentum=0.9)),
        (GPT, lambda p: syncfree.AdamW(p)),
        (ConvNet, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ],
    ids=["sgd", "adamw", "syncfree-sgd", "syncfree-adamw", "convolutions"],
)
def test_nothing_in_a_step_reads_the_host_or_cuts_the_graph(
    xla: torch.device, kind: Any, make: Any, policy: str
) -> None:
    model, batch, _, _ = by_hand(kind)
    model, batch = model.to(xla), to(xla, batch)
    optimizer = make(model.parameters())
    wrap(model, optimizer, policy)
    train(model, optimizer, batch, steps=3)
    torch_xla.sync(wait=True)
    met.clear_all()
    steps = 4
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, *batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch_xla.sync()
    counters, metrics = set(met.counter_names()), set(met.metric_names())
    assert not [name for name in counters if name.startswith("aten::")], "an operation fell back to the host"
    assert "TransferFromDeviceTime" not in metrics, "a tensor was read on the host"
    assert met.counter_value("MarkStep") == steps
    # One graph a step, from the second on compiled already (clipping is new in the first).
    assert met.counter_value("UncachedCompile") in (None, 1)
    assert met.counter_value("CachedCompile") >= steps - 1


def test_fused_flag_is_refused_by_torch_itself_wrapped_or_not(xla: torch.device) -> None:
    # What follows: on XLA the plain and the syncfree optimizers are the fused ones, the compiler sees to it.
    for policy in ("32-true", "bf16-mixed"):
        model = nn.Linear(2, 2).to(xla)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        wrap(model, optimizer, policy)
        model(torch.ones(1, 2).to(xla)).sum().backward()
        with pytest.raises(RuntimeError, match="`fused=True` requires"):
            optimizer.step()


def test_float16_becomes_bfloat16_without_scaling_said_once_and_in_the_plan(xla: torch.device) -> None:
    import wrapprec.install

    wrapprec.install._said.clear()
    said = "float16 is no type of XLA devices: bfloat16 is used in its place, without a loss scale"
    model = nn.Linear(4, 4).to(xla)
    with pytest.warns(UserWarning, match=said):
        handle = wrap(model, torch.optim.SGD(model.parameters()), "16-mixed")
    assert handle.plan.notes == (said,) and said in str(handle.plan)
    assert handle.plan.loss_scale is None and handle.scale == 1.0
    assert handle.plan.placement("").precision.compute_dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(nn.Linear(4, 4).to(xla), None, "16-module")


@pytest.mark.parametrize("casting", ["mixed", "module"])
def test_float16_policy_places_every_module_as_the_bfloat16_policy_does(xla: torch.device, casting: str) -> None:
    model = GPT().to(xla)
    half, brain = (wrapprec.resolve(model, f"{bits}-{casting}").placements for bits in ("16", "bf16"))
    assert [p.precision for p in half] == [p.precision for p in brain]
    assert [p.activations for p in half] == [p.activations for p in brain]


def test_explicit_loss_scale_is_dropped_too_and_a_float16_rule_becomes_bfloat16(xla: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(xla)
    handle = wrap(model, None, "bf16-mixed", rules=[Rule("1", "16-module")], loss_scale=1024.0)
    assert handle.plan.loss_scale is None
    assert {p.precision.compute_dtype for p in handle.plan.placements} == {torch.bfloat16}


def test_auto_is_bf16_mixed(xla: torch.device) -> None:
    policy, reason = auto_policy(xla)
    assert policy == Policy.parse("bf16-mixed") and "XLA" in reason
    assert isinstance(backend_for(xla), XlaBackend)


@pytest.mark.parametrize("policy", BF16)
def test_users_own_step_context_drives_the_graph(xla: torch.device, policy: str) -> None:
    model, batch, losses, _ = by_hand(GPT, steps=3)
    model, batch = model.to(xla), to(xla, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrap(model, optimizer, policy)
    mine = []
    for _ in range(3):
        with torch_xla.step():
            optimizer.zero_grad()
            loss = loss_of(model, *batch)
            loss.backward()
            optimizer.step()
        mine.append(loss.item())
    # bfloat16's rounding, summed over three steps.
    assert mine == pytest.approx(losses, rel=0.02)


@pytest.mark.parametrize("policy", BF16)
def test_compiled_with_openxla_gives_the_same_gradients(xla: torch.device, policy: str) -> None:
    model, batch, _, gradients = by_hand(ConvNet)
    model = model.to(xla)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrap(model, optimizer, policy)
    compiled = torch.compile(model, backend="openxla")
    _, first = train(model, optimizer, to(xla, batch), steps=2, call=compiled)
    assert_as_near(first, gradients, autocast_gradients(ConvNet))


@pytest.mark.parametrize("policy", BF16)
def test_checkpoint_of_torch_xla_recomputes_in_the_same_precision(xla: torch.device, policy: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(8, 8), Block(8), nn.Linear(8, 8)
            self.again = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = checkpoint(self.block, x) if self.again else self.block(x)
            return self.last(x)

    torch.manual_seed(0)
    model, x = Net().to(xla), torch.randn(2, 4, 8).to(xla)
    wrap(model, None, policy)
    results = []
    for again in (False, True):
        model.again = again
        model.zero_grad()
        model(x).square().sum().backward()
        torch_xla.sync()
        results.append([p.grad.cpu() for p in model.parameters()])
    # The same operations in the same order: the compiler may fuse them otherwise, within bfloat16's rounding.
    for plain, recomputed in zip(*results, strict=True):
        assert (plain - recomputed).norm() <= 2**-7 * plain.norm() + 1e-6


@pytest.mark.parametrize("policy", BF16)
def test_saved_and_resumed_run_ends_where_the_other_one_does(xla: torch.device, policy: str, tmp_path: Path) -> None:
    import torch_xla.core.xla_model as xm

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model, batch, _, _ = by_hand(GPT)
        model = model.to(xla)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, to(xla, batch)

    model, optimizer, batch = start()
    handle = wrap(model, optimizer, policy)
    train(model, optimizer, batch, steps=2)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
    xm.save(state, str(tmp_path / "run.pt"))
    whole, _ = train(model, optimizer, batch, steps=2)

    model, optimizer, batch = start()
    handle = wrap(model, optimizer, policy)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    handle.load_state_dict(saved["handle"])
    assert train(model, optimizer, batch, steps=2)[0] == whole


@pytest.mark.parametrize("policy", BF16)
def test_unwrap_gives_the_plain_model_back(xla: torch.device, policy: str) -> None:
    model, batch, _, _ = by_hand(GPT)
    model, batch = model.to(xla), to(xla, batch)
    keys = list(model.state_dict())
    before = model(batch[0]).cpu()
    wrap(model, None, policy)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(batch[0]).cpu(), before)
    unwrap(model)
    assert torch.equal(model(batch[0]).cpu(), before)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("policy", BF16)
def test_frozen_weights_give_the_same_outputs(xla: torch.device, policy: str) -> None:
    model, batch, _, _ = by_hand(GPT)
    model, batch = model.to(xla), to(xla, batch)
    handle = wrap(model, None, policy)
    with torch.no_grad():
        plain = model(batch[0]).cpu()
        with handle.frozen():
            assert torch.equal(model(batch[0]).cpu(), plain)


@pytest.mark.parametrize("policy", BF16)
def test_output_that_is_a_view_of_another_shows_the_same_numbers(xla: torch.device, policy: str) -> None:
    # XLA's tensors say that they are contiguous and begin at 0, views of columns too.
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            whole = self.fc(x)
            return whole, whole[:, 1], whole.t()

    torch.manual_seed(0)
    plain, x = Both(), torch.randn(5, 4)
    model = copy.deepcopy(plain).to(xla)
    wrap(model, None, policy)
    found = []
    for net, inputs in ((plain, x), (model, x.to(xla))):
        whole, column, turned = net(inputs)
        assert torch.equal(whole[:, 1].cpu(), column.cpu()) and torch.equal(whole.t().cpu(), turned.cpu())
        with torch.no_grad():
            whole.mul_(2)
        assert torch.equal(whole[:, 1].cpu(), column.cpu())  # a write into the one shows in the other
        (column * torch.arange(1.0, 6.0, device=column.device)).sum().backward()
        found.append(net.fc.weight.grad.cpu())
    # Two roundings to bfloat16.
    assert (found[1] - found[0]).norm() <= 4 * 2**-9 * found[0].norm()


def test_island_switches_autocast_off(xla: torch.device) -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with wrapprec.float32():
                inside = self.fc(x)
            seen.extend([inside.dtype, self.fc(x).dtype])
            return inside

    seen: list[torch.dtype] = []
    model = Island().to(xla)
    wrap(model, None, "bf16-mixed")
    model(torch.ones(2, 4).to(xla))
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("policy", BF16)
def test_recurrent_net_runs_in_bfloat16(xla: torch.device, policy: str) -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(4, 8, 2), torch.randn(5, 2, 4)
    true, _ = model(x)
    model, x = model.to(xla), x.to(xla)
    wrap(model, None, policy)
    out, _ = model(x)
    assert out.dtype == torch.float32
    assert "bf16" in dots(torch_xla._XLAC._get_xla_tensors_hlo([out]))
    # Five time steps of bfloat16.
    assert torch.allclose(out.cpu(), true, atol=5 * 2**-8)


def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A net that compiles in a second, and a batch, on the host."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    return model, (torch.randn(32, 8), torch.randint(0, 4, (32,)))


@pytest.mark.filterwarnings("ignore:Expected a rounding that keeps small updates")
@pytest.mark.parametrize(
    ("rounding", "make"),
    [
        ("kahan", torch.optim.AdamW),
        ("kahan", syncfree.AdamW),
        ("stochastic", torch.optim.AdamW),
        ("nearest", torch.optim.AdamW),
    ],
)
def test_true_bfloat16_trains_and_reads_nothing(xla: torch.device, rounding: str, make: Any) -> None:
    model, batch = small()
    plain, rival = copy.deepcopy(model), None
    rival = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    trues = []
    for _ in range(8):
        rival.zero_grad()
        loss = loss_of(plain, *batch)
        loss.backward()
        rival.step()
        trues.append(loss.item())
    model, batch = model.to(xla), to(xla, batch)
    optimizer = make(model.parameters(), lr=1e-2)
    handle = wrap(model, optimizer, f"bf16-true,rounding={rounding}")
    assert {m.weight.dtype for m in model.modules() if isinstance(m, nn.Linear)} == {torch.bfloat16}
    torch_xla.sync(wait=True)
    met.clear_all()
    mine = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        torch_xla.sync()
        mine.append(loss.detach())
    torch_xla.sync(wait=True)
    assert not [name for name in met.counter_names() if name.startswith("aten::")]
    assert "TransferFromDeviceTime" not in met.metric_names()
    # The optimizer has state from the second step on, and syncfree's another counter: the programs stay the same then.
    assert (met.counter_value("UncachedCompile") or 0) <= 3
    # bfloat16's rounding, summed over the steps.
    assert [float(loss) for loss in mine] == pytest.approx(trues, rel=0.02)
    assert trues[-1] < 0.9 * trues[0]
    handle.unwrap()
    assert {(p.dtype, p.device) for p in model.parameters()} == {(torch.float32, xla)}


def test_small_updates_of_bfloat16_weights_are_kept(xla: torch.device) -> None:
    # Each is a 64th of the weight's last place: rounded to nearest, none of them would ever show.
    model = nn.Linear(8, 8, bias=False)
    nn.init.ones_(model.weight)
    model = model.to(xla)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-13)
    handle = wrap(model, optimizer, "bf16-true")
    assert handle.policy.rounding == "kahan"
    for _ in range(40):
        model.weight.grad = torch.full_like(model.weight, -1.0)
        optimizer.step()
        torch_xla.sync()
    handle.unwrap()
    # Float32 adds these numbers without rounding.
    assert torch.equal(model.weight.detach().cpu(), torch.full((8, 8), 1 + 40 * 2.0**-13))


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=64, max_size=64), seed=st.integers(0, 2**63))
@settings(max_examples=20)
def test_weights_and_remainders_are_those_of_the_host_to_the_last_bit(words: list[int], seed: int) -> None:
    # Zeros, subnormals, the largest, inf and nan first: 64 numbers in all, which is one program.
    known = [0, -(2**31), 1, 0x8000, 0x8001, 0x7FFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, -0x800000, 0x7F800001, -1]
    wide = torch.tensor((known + words)[:64], dtype=torch.int32).view(torch.float32)
    device = torch_xla.device()
    found = []
    for there in (torch.device("cpu"), device):
        bits = Counted(there)
        bits.manual_seed(seed)
        low, rest = split(wide.to(there), torch.bfloat16)
        back, chance = combine(low, rest), round_by_chance(wide.to(there), torch.bfloat16, bits)
        again = round_by_chance(wide.to(there), torch.bfloat16, bits)
        results = [one.cpu() for one in (low, rest, back, chance, again, bits.get_state())]
        found.append([one if one.dtype is torch.int64 else one.view(torch.uint8) for one in results])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_true_bfloat16_is_moved_trained_and_given_back(xla: torch.device) -> None:
    model, batch = small()
    plain = copy.deepcopy(model)
    # With an optimizer, or there would be no remainders.
    handle = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "bf16-true,rounding=kahan")
    model.to(xla)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer)
    train(model, optimizer, to(xla, batch), steps=2)
    handle.unwrap()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    rival = torch.optim.SGD(plain.parameters(), lr=0.1)
    start = copy.deepcopy(plain)
    for _ in range(2):
        rival.zero_grad()
        loss_of(plain, *batch).backward()
        rival.step()
    for mine, true, first in zip(model.parameters(), plain.parameters(), start.parameters(), strict=True):
        # bfloat16's rounding of two gradients, and nothing of the weights' own.
        assert (mine.cpu() - true).norm() <= 8 * 2**-8 * (true - first).norm()


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_true_bfloat16_goes_on_from_a_checkpoint_to_the_last_bit(
    xla: torch.device, rounding: str, tmp_path: Path
) -> None:
    import torch_xla.core.xla_model as xm

    def start() -> tuple[nn.Module, Any, wrapprec.Handle, Any]:
        model, batch = small()
        model = model.to(xla)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer, wrap(model, optimizer, f"bf16-true,rounding={rounding}"), to(xla, batch)

    model, optimizer, handle, batch = start()
    train(model, optimizer, batch, steps=2)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
    xm.save(state, str(tmp_path / "run.pt"))
    train(model, optimizer, batch, steps=2)
    handle.unwrap()

    other, optimizer, handle, batch = start()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    handle.load_state_dict(saved["handle"])
    train(other, optimizer, batch, steps=2)
    handle.unwrap()  # with the remainders
    for mine, true in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine.cpu(), true.cpu())
