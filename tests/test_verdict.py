"""Whether gradients are finite, whose overflow it was, and when to give up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import wrapprec
from wrapprec.verdict import non_finite

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    grads = [torch.ones(5, dtype=dtype), torch.ones(3, 2), torch.ones(4, dtype=dtype)]
    assert non_finite(grads, CPU).item() == 0.0
    grads[2][1] = bad
    assert non_finite(grads, CPU).item() == 1.0


def test_finite_gradients_are_left_bit_for_bit_as_they_are() -> None:
    grads = [torch.randn(100), torch.tensor([0.0, -0.0, 1e-45, 3.4e38])]
    copies = [g.clone() for g in grads]
    assert non_finite(grads, CPU).item() == 0.0
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(grads, copies, strict=True))


@pytest.mark.parametrize(
    "grad",
    [
        torch.tensor([[1.0], [math.inf]]).expand(2, 3),
        torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[math.nan, 1.0]]), (3, 2), check_invariants=True),
        torch.tensor([1.0 + 0j, complex(0, math.inf)]),
        torch.tensor(math.inf),
        torch.tensor([[1.0, math.inf], [0.0, 0.0]]).t(),
    ],
    ids=["expanded", "sparse", "complex", "scalar", "transposed"],
)
def test_gradients_of_every_layout_are_looked_at(grad: torch.Tensor) -> None:
    assert non_finite([torch.ones(2), grad], CPU).item() == 1.0


def test_no_gradients_at_all_are_finite() -> None:
    assert non_finite([], CPU).item() == 0.0
    assert non_finite([torch.empty(0)], CPU).item() == 0.0


def scaled(width: int = 4) -> nn.Module:
    return nn.Linear(width, 1)


def test_one_optimizer_of_two_models_lowers_only_the_scale_of_the_one_that_overflowed() -> None:
    a, b = scaled(), scaled()
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    handle = wrapprec.wrap([a, b], optimizer, "16-module", loss_scale=wrapprec.LossScale(init_scale=64.0))
    a(torch.ones(2, 4)).mean().backward()
    (b(torch.ones(2, 4)).mean() * math.inf).backward()
    before = [p.clone() for p in a.parameters()]
    optimizer.step()
    assert handle.scales == (64.0, 32.0)
    assert handle.step_was_skipped  # one optimizer: all its parameters or none
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), before, strict=True))


def test_inf_that_the_user_puts_into_one_models_gradient_lowers_that_models_scale() -> None:
    a, b = scaled(), scaled()
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    handle = wrapprec.wrap([a, b], optimizer, "16-module", loss_scale=wrapprec.LossScale(init_scale=64.0))
    (a(torch.ones(2, 4)).mean() + b(torch.ones(2, 4)).mean()).backward()
    a.weight.grad[0, 0] = math.inf
    optimizer.step()
    assert handle.scales == (32.0, 64.0)
    assert handle.step_was_skipped


def test_inf_in_a_gradient_that_no_model_owns_lowers_all_scales_of_the_optimizer() -> None:
    a, b, stranger = scaled(), scaled(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters(), stranger], lr=0.1)
    with pytest.warns(wrapprec.WrapprecWarning, match="no wrapped model owns"):
        handle = wrapprec.wrap([a, b], optimizer, "16-module", loss_scale=wrapprec.LossScale(init_scale=64.0))
    (a(torch.ones(2, 4)).mean() + b(torch.ones(2, 4)).mean() + stranger.sum() * math.inf).backward()
    optimizer.step()
    assert handle.scales == (32.0, 32.0)
    assert stranger.item() == 1.0


def test_a_model_that_took_no_part_in_a_step_counts_nothing() -> None:
    a, b = scaled(), scaled()
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    scale = wrapprec.LossScale(init_scale=64.0, growth_interval=1)
    handle = wrapprec.wrap([a, b], optimizer, "16-module", loss_scale=scale)
    a(torch.ones(2, 4)).mean().backward()
    optimizer.step()
    assert handle.scales == (128.0, 64.0)
