"""One program, four policies: run it on a plain float32 model and on a wrapped one, and compare all that it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sidebyside
import torch
from sidebyside import POLICIES, Results, assert_same, dense, each_policy, grads
from sidebyside import each_f16_policy as each_scaled
from torch import Tensor, nn

import wrapprec

__all__ = ["POLICIES", "TOLERANCE", "Found", "assert_close", "batch", "compare", "each_policy", "each_scaled", "grads"]

Found = Results

# Twice the steps that `sidebyside` allows: these programs call a model more than once, or feed it its own outputs.
_SLACK = 2.0
TOLERANCE = {kind: _SLACK * value for kind, value in sidebyside.TOLERANCE.items()}


def assert_close(got: Found, want: Found, policy: str, slack: float = 1.0) -> None:
    assert_same(got, want, policy, _SLACK * slack)


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
