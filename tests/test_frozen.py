"""`frozen()` casts the weights once, computes what it would have computed without, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wrapprec

POLICIES = ["16-mixed", "16-module", "bf16-mixed", "bf16-module"]
LOW = (torch.float16, torch.bfloat16)


class Casts(TorchDispatchMode):
    """Counts copies of tensors of a weight's shape from float32 to low precision."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in LOW and args[0].shape in self.shapes:
            self.count += 1
        return func(*args, **kwargs)


class Zoo(nn.Module):
    """Modules of many kinds, of which every weight matrix has a shape of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x)
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mid = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mid(self.emb(tokens)))


class Normed(nn.Linear):
    """A Linear that computes with its weight before it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(11, 8), Normed(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.emb(tokens))


class Encoder(nn.Module):
    """torch's own encoder, which in eval mode may hand all weights of a layer to one kernel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(self.emb(tokens))


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 10]])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [Zoo, Tied, Custom, Encoder])
def test_outputs_are_those_of_no_grad_to_the_bit(kind: type[nn.Module], policy: str, train: bool) -> None:
    model = kind().train(train)
    handle = wrapprec.wrap(model, policy=policy)
    with torch.no_grad():
        expected = model(TOKENS)
    with handle.frozen():
        for _ in range(3):
            found = model(TOKENS)
            assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("policy", ["16-module", "bf16-mixed", "bf16-module"])
def test_outputs_of_an_lstm_are_those_of_no_grad_to_the_bit(policy: str) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(8, 8, num_layers=2, batch_first=True).eval()
    handle = wrapprec.wrap(model, policy=policy)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)[0]
    with handle.frozen():
        assert torch.equal(model(x)[0], expected)
        assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_are_cast_once(policy: str) -> None:
    model = Zoo()
    handle = wrapprec.wrap(model, policy=policy)
    shapes = {model.conv.weight.shape, model.head.weight.shape}
    with torch.no_grad(), Casts(shapes) as each_time:
        for _ in range(3):
            model(TOKENS)
    with handle.frozen(), Casts(shapes) as once:
        for _ in range(3):
            model(TOKENS)
    assert each_time.count == 6 and once.count == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_off_inside_and_on_again_afterwards(policy: str) -> None:
    model = Zoo()
    handle = wrapprec.wrap(model, policy=policy)
    with handle.frozen():
        assert not torch.is_grad_enabled()
        assert not model(TOKENS).requires_grad
    assert torch.is_grad_enabled() and model(TOKENS).requires_grad
    model(TOKENS).sum().backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("policy", POLICIES)
def test_parameters_and_state_dict_stay_float32_and_the_same_objects(policy: str) -> None:
    model = Zoo()
    parameters = dict(model.named_parameters())
    handle = wrapprec.wrap(model, policy=policy)
    with handle.frozen():
        model(TOKENS)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("policy", POLICIES)
def test_new_weights_are_seen_after_leaving(policy: str) -> None:
    model = Zoo()
    handle = wrapprec.wrap(model, policy=policy)
    with handle.frozen():
        before = model(TOKENS)
    with torch.no_grad():
        model.head.weight.data.mul_(2.0)  # changes no version counter
        expected = model(TOKENS)
    with handle.frozen():
        assert torch.equal(model(TOKENS), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_nested_use_keeps_the_outer_weights_until_the_outer_ends(policy: str) -> None:
    model = Zoo()
    handle = wrapprec.wrap(model, policy=policy)
    with Casts({model.head.weight.shape}) as casts:
        with handle.frozen():
            model(TOKENS)
            with handle.frozen():
                model(TOKENS)
            model(TOKENS)
        assert casts.count == 1
        with torch.no_grad():
            model(TOKENS)
    assert casts.count == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_an_exception_inside_ends_it(policy: str) -> None:
    model = Zoo()
    handle = wrapprec.wrap(model, policy=policy)
    with pytest.raises(IndexError), handle.frozen():
        model(TOKENS)
        model(torch.tensor([[99]]))
    assert torch.is_grad_enabled() and handle._models[0].frozen is None
    assert model(TOKENS).requires_grad


@pytest.mark.parametrize("policy", POLICIES)
def test_inference_mode_inside_and_around_works(policy: str) -> None:
    model = Zoo()
    handle = wrapprec.wrap(model, policy=policy)
    with torch.no_grad():
        expected = model(TOKENS)
    with torch.inference_mode(), handle.frozen():
        assert torch.equal(model(TOKENS), expected)
    with handle.frozen():
        with torch.inference_mode():
            assert torch.equal(model(TOKENS), expected)
        assert torch.equal(model(TOKENS), expected)
    model(TOKENS).sum().backward()


def test_full_precision_and_disabled_handles_freeze_nothing_but_switch_gradients_off() -> None:
    for options in ({"policy": "32-true"}, {"enabled": False}):
        model = Zoo()
        expected = model(TOKENS)
        handle = wrapprec.wrap(model, **options)
        with handle.frozen():
            out = model(TOKENS)
        assert torch.equal(out, expected) and not out.requires_grad


def test_training_goes_on_between_evaluations() -> None:
    torch.manual_seed(0)
    model = Zoo()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = wrapprec.wrap(model, optimizer, "bf16-module")
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
        with handle.frozen():
            losses.append(model(TOKENS).square().mean().item())
    assert losses == sorted(losses, reverse=True)
