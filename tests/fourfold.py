"""One program, four policies: run it on a plain float32 model and on a wrapped one, and compare all that it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec

Found = dict[str, "Tensor | None"]

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
each_policy = pytest.mark.parametrize("policy", POLICIES)
each_scaled = pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
# Eight rounding steps of the compute dtype in the norm: activations, weights and gradients are rounded once each in
# two or three layers. A border that is missing or too many is off by the loss scale, 65536 by default.
TOLERANCE = {"16": 8 * 2**-10, "bf": 8 * 2**-7}


def grads(model: nn.Module) -> Found:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def dense(tensor: Tensor) -> Tensor:
    """The numbers, in float64, whatever the layout."""
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def assert_close(got: Found, want: Found, policy: str, slack: float = 1.0) -> None:
    assert got.keys() == want.keys()
    for name, true in want.items():
        mine = got[name]
        if true is None or mine is None:
            assert mine is None and true is None, f"{name}: {mine} instead of {true}"
            continue
        assert (mine.dtype, mine.shape, mine.layout) == (true.dtype, true.shape, true.layout), name
        off = (dense(mine) - dense(true)).norm() / dense(true).norm().clamp(min=1e-30)
        assert off <= slack * TOLERANCE[policy[:2]], f"{name}: relative error {off:.2e}"


def compare(make: Callable[[], nn.Module], run: Callable[[Any], Found], policy: str, slack: float = 1.0) -> None:
    """Fail unless the wrapped model gives what the plain one gives; errors are the program's to catch.

    Args:
        make: the model; called twice with the same seed.
        run: the program; returns the tensors to compare, by name.
        policy: under float16 the loss scale is the default, so losses have to be small.
        slack: times the tolerance.
    """
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    mine = make()
    torch.manual_seed(1)
    want = run(plain)
    assert all(t is None or dense(t).norm() > 0 for t in want.values()), "the reference shows nothing"
    handle = wrapprec.wrap(mine, policy=policy)
    assert handle.scale == (65536.0 if policy.startswith("16") else 1.0)
    torch.manual_seed(1)
    assert_close(run(mine), want, policy, slack)


def batch(requires_grad: bool = False) -> Tensor:
    return torch.randn(6, 8, requires_grad=requires_grad)
