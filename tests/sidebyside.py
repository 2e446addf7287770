"""Runs one program on a plain float32 model and on a wrapped one, and compares everything that it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec

Results = dict[str, "Tensor | None"]
Program = Callable[[Any], Results]

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
each_policy = pytest.mark.parametrize("policy", POLICIES)
each_f16_policy = pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
each_module_policy = pytest.mark.parametrize("policy", ["bf16-module", "16-module"])

LOW = {"16": torch.float16, "bf": torch.bfloat16}
# Eight rounding steps of the compute dtype in the norm of a tensor: activations, weights and gradients are rounded
# once each in two or three layers. A wrong border is off by the loss scale, 65536; a lost term by tens of per cent.
# fp8 rounds the operands of a product to 2**-4 (e4m3) and 2**-3 (e5m2), 0.026 and 0.052 of their norm on the average,
# so that gradients through three layers are some 0.1 off.
TOLERANCE = {"16": 8 * 2**-11, "bf": 8 * 2**-8, "fp": 0.2}


def grads(model: nn.Module) -> Results:
    """The gradient of every parameter by name."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def weights(model: nn.Module) -> Results:
    """Every parameter and floating buffer by name, after "state."."""
    return {f"state.{name}": t.detach().clone() for name, t in model.state_dict().items() if t.is_floating_point()}


def dense(tensor: Tensor) -> Tensor:
    """The numbers, in float64, whatever the layout."""
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def assert_same(got: Results, want: Results, policy: str, slack: float = 1.0) -> None:
    """Equal up to the rounding of the policy's dtype."""
    assert got.keys() == want.keys()
    for name, true in want.items():
        mine = got[name]
        if true is None or mine is None:
            assert mine is None and true is None, f"{name}: {mine} instead of {true}"
            continue
        assert (mine.dtype, mine.shape, mine.layout) == (true.dtype, true.shape, true.layout), name
        off = (dense(mine) - dense(true)).norm() / dense(true).norm().clamp(min=1e-30)
        assert off <= slack * TOLERANCE[policy[:2]], f"{name}: relative error {off:.2e}"


def compare(
    run: Program, policy: str, make: Callable[[], nn.Module], slack: float = 1.0, **options: Any
) -> tuple[Results, wrapprec.Handle]:
    """Run a program on a plain model and on a wrapped one that was made from the same seed.

    Returns:
        What the wrapped one gave, and its handle.
    """
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    mine = make()
    torch.manual_seed(1)
    want = run(plain)
    shown = [value for value in want.values() if value is not None]
    assert any(value.to_dense().abs().sum() > 0 for value in shown), "the reference shows nothing"
    assert all(value.to_dense().isfinite().all() for value in shown), "the reference is no reference"
    handle = wrapprec.wrap(mine, policy=policy, **options)
    torch.manual_seed(1)
    got = run(mine)
    assert_same(got, want, policy, slack)
    return got, handle


def seen(module: nn.Module, name: str = "weight") -> list[torch.dtype]:
    """The dtypes in which a module's forward finds one of its weights from now on."""
    found: list[torch.dtype] = []
    forward = type(module).forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(getattr(self, name).dtype)
        return forward(self, *args, **kwargs)

    module.__class__ = type(type(module).__name__, (type(module),), {"forward": spy})
    return found
