"""Wrapped models under torch.compile: no graph break, true gradients, overflow skipped, one compilation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import wrapprec
from wrapprec import LossScale, Rule, wrap

POLICIES = ["16-mixed", "bf16-mixed", "16-module", "bf16-module"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, *, gain: float = 1.0) -> torch.Tensor:
        return x + gain * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x, gain=0.5)
        return {"logits": self.head(x), "hidden": x}


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def loss_of(out: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(out["logits"].flatten(0, 1), tokens.flatten()) + out["hidden"].pow(2).mean()


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reference_grads(tokens: torch.Tensor) -> list[torch.Tensor]:
    model = make()
    loss_of(model(tokens), tokens).backward()
    return [p.grad for p in model.parameters()]


def close(model: nn.Module, reference: list[torch.Tensor], tolerance: float) -> None:
    for param, wanted in zip(model.parameters(), reference, strict=True):
        assert param.grad.dtype == torch.float32
        assert (param.grad - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("how", "backend"),
    # One way of compiling is enough for the slow backend.
    [("compile", "aot_eager"), ("method", "aot_eager"), ("before", "aot_eager"), ("compile", "inductor")],
)
def test_compiled_whole_graph_has_true_gradients(policy, how, backend):
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    model = make()
    counter = CompileCounterWithBackend(backend)
    scale = LossScale(init_scale=2.0**10, growth_interval=1) if policy.startswith("16") else None
    call = torch.compile(model, backend=counter, fullgraph=True) if how == "before" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wrap(model, optimizer, policy, loss_scale=scale)
    if how == "compile":
        call = torch.compile(model, backend=counter, fullgraph=True)
    elif how == "method":
        model.compile(backend=counter, fullgraph=True)
        call = model
    reference = reference_grads(tokens)
    for _ in range(3):
        model.zero_grad()
        out = call(tokens)
        assert out["logits"].dtype == torch.float32
        loss_of(out, tokens).backward()
        # Relative rounding of a product of a few low precision operations: 2**-8 (bf16), 2**-11 (f16) each.
        close(model, reference, 0.03 if policy.startswith("bf16") else 0.005)
        optimizer.step()
    if policy.startswith("16"):
        assert handle.scale == 2.0**13
    assert counter.frame_count == 1, "the scale's growth must not compile anew"
    handle.unwrap()
    model.zero_grad()
    loss_of(model(tokens), tokens).backward()
    close(model, reference, 1e-5)


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_overflow_in_compiled_backward_skips_the_step(policy, backend):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=2.0**24, growth_interval=2))
    call = torch.compile(model, backend=backend, fullgraph=True)
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    (loss_of(call(tokens), tokens) * 1000).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    for p in model.parameters():
        p.grad.nan_to_num_(0.0)
    optimizer.step()
    assert handle.step_was_skipped and handle.scale == 2.0**23
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_rule_island_compiles_inside_a_low_precision_model():
    model = make()
    wrap(model, policy="bf16-mixed", rules=[Rule("blocks.1", "float32")])
    seen = []
    model.blocks[1].up.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    call(torch.zeros(2, 5, dtype=torch.long))
    assert seen and set(seen) == {torch.float32}


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_generation_is_the_same_compiled(policy):
    model = make()
    handle = wrap(model, policy=policy)
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    with handle.frozen():
        eager = model(tokens)["logits"]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens)["logits"]
    assert torch.equal(eager, compiled)


def test_float32_island_in_forward_compiles():
    class Scatter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            h = self.fc(x)
            with wrapprec.float32():
                return torch.zeros(3, 4).index_add_(0, index, h)

    model = Scatter()
    wrap(model, policy="bf16-module")
    x, index = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(torch.compile(model, backend="aot_eager")(x, index), model(x, index))
