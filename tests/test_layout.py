"""`channels_last`: weights are lent, activations cast and gradients returned in the memory format they had."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fourfold import POLICIES, Found, assert_close, grads
from torch import Tensor, nn

import wrapprec
from wrapprec.backends.base import Lending
from wrapprec.backends.cpu import CpuBackend

Strides = dict[str, tuple[int, ...]]


class Net(nn.Module):
    """Convolutions in 2 or 3 dimensions; what its forward sees of weights and activations is noted by strides."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.first, self.norm = conv(4, 8, 3, padding=1, bias=False), norm(8)
        self.grouped, self.out = conv(8, 8, 3, padding=1, groups=2), nn.Linear(8, 3)
        self.strides: Strides = {}
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        normed = self.norm(first).tanh()
        out = self.grouped(normed)
        shown = {"x": x, "first": first, "normed": normed, "out": out}
        shown |= {"weight": self.first.weight, "grouped": self.grouped.weight}
        self.strides = {name: tensor.stride() for name, tensor in shown.items()}
        self.dtypes = {first.dtype, out.dtype}
        return out, self.out(out.flatten(2).mean(2))


def run(model: Any, x: Tensor) -> tuple[Found, Strides]:
    x = x.detach().requires_grad_()
    out, logits = model(x)
    (out.sigmoid().mean() + logits.square().mean()).backward()
    found = {"out": out.detach(), "logits": logits.detach(), "x": x.grad, **grads(model)}
    strides = {f"found {name}": tensor.stride() for name, tensor in found.items() if tensor is not None}
    return found, {**strides, **model.strides}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("multi_tensor", [False, True])
def test_memory_format_is_that_of_the_plain_model_everywhere(
    policy: str, dimensions: int, multi_tensor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CUDA's way to lend is another code path, which runs on a CPU, too.
    monkeypatch.setattr(CpuBackend, "lending", Lending(2**22 if multi_tensor else 0, multi_tensor))
    last = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    torch.manual_seed(0)
    plain: Any = Net(dimensions).to(memory_format=last)
    model = copy.deepcopy(plain)
    x = torch.randn(3, 4, *[6] * dimensions).to(memory_format=last)
    true, strides = run(plain, x)
    assert plain.first.weight.is_contiguous(memory_format=last) and not plain.first.weight.is_contiguous()
    handle = wrapprec.wrap(model, None, policy)
    got, mine = run(model, x)
    assert_close(got, true, policy)
    # Torch's kernels decide about activations (not all in float16 keep the format): as a model cast by hand has them.
    low = torch.float16 if policy.startswith("16") else torch.bfloat16
    _, cast = run(copy.deepcopy(plain).to(low), x.to(low))
    activations = ("first", "normed", "out", "found out")
    assert mine == {**strides, **{name: cast[name] for name in activations}}
    assert model.dtypes == {low}
    handle.unwrap()
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in plain.parameters()]


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_weights_keep_their_memory_format(policy: str) -> None:
    model = Net(2).to(memory_format=torch.channels_last)
    x = torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last)
    with wrapprec.wrap(model, None, policy) as handle, handle.frozen():
        model(x)
        for name in ("weight", "first", "out"):
            stride = model.strides[name]
            assert stride[1] == 1 and stride[-1] > 1, name
