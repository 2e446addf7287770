"""`wrapprec.float32()`: code in float32 inside somebody's forward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wrapprec
from wrapprec import float32

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

F32, BF16 = torch.float32, torch.bfloat16
CONFIGS: list[Any] = [("16-mixed", 1024), ("16-module", 1024), ("bf16-mixed", None), ("bf16-module", None)]


class Scatters(nn.Module):
    """Sums rows by index, in float32 however it is called."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(8, 8), way
        self.island = wrapprec.float32()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        if self.way == "decorator":
            return self.total(hidden)
        with self.island:
            out = torch.zeros(3, 8).index_add_(0, torch.arange(6) % 3, hidden)
            out = out.scatter_add(0, torch.zeros(6, 8, dtype=torch.long), hidden)
            logits = F.linear(out, self.layer.weight)
            assert out.dtype == F32 and logits.dtype == F32 and self.layer(out).dtype == F32
        return logits

    @wrapprec.float32()
    def total(self, hidden: Tensor) -> Tensor:
        assert hidden.dtype == F32
        return F.linear(torch.zeros(3, 8).index_add_(0, torch.arange(6) % 3, hidden), self.layer.weight)


@pytest.mark.parametrize(("policy", "scale"), CONFIGS)
@pytest.mark.parametrize("way", ["context", "decorator"])
def test_scatter_code_computes_in_float32_with_true_gradients(policy: str, scale: Any, way: str) -> None:
    torch.manual_seed(0)
    plain = Scatters(way)
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy, loss_scale=scale)
    x = torch.randn(6, 8)
    losses = [model(x).square().mean() for model in (plain, mine)]
    for loss in losses:
        loss.backward()
    # One low-precision layer in front, and lent low weights behind.
    tolerance = 8 * (2**-10 if policy.startswith("16") else 2**-7)
    for p, q in zip(plain.parameters(), mine.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= tolerance * p.grad.norm()


def test_small_terms_are_not_lost() -> None:
    ones = torch.full((4096,), 1.0, dtype=BF16)
    with float32():
        assert ones.sum().item() == 4096 and ones.cumsum(0)[-1].item() == 4096
        total = torch.zeros(1).index_add_(0, torch.zeros(4096, dtype=torch.long), ones)
    assert total.item() == 4096


def test_results_go_where_out_says() -> None:
    a, out = torch.full((2,), 1.5, dtype=BF16), torch.zeros(2, dtype=BF16)
    values, places = torch.zeros(1, dtype=BF16), torch.zeros(1, dtype=torch.long)
    with float32():
        result = torch.add(a, a, out=out)
        torch.max(torch.ones(1, 3, dtype=BF16), 1, out=(values, places))
    assert result is out and out.dtype == BF16 and out.tolist() == [3, 3] and values.item() == 1


def test_operations_in_place_stay_where_they_are() -> None:
    low, also = torch.ones(3, dtype=BF16), torch.ones(3, dtype=BF16)
    alias = low
    with float32():
        low += 1
        low[0] = 5
        torch._foreach_mul_([low, also], 2.0)
        low.clamp_(max=8)
    assert alias is low and low.dtype == BF16 and low.tolist() == [8, 4, 4] and also.tolist() == [2, 2, 2]


def test_wrapped_model_may_be_called_in_an_island() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(3, 8)
    plain = model(x).detach()
    wrapprec.wrap(model, policy="16-module", loss_scale=64)
    for module in model.modules():
        module.__dict__["forward"].multi_tensor = True
    with float32():
        out = model(x)
        out.sum().backward()
    # Weights were rounded to float16 on their way in.
    assert (out - plain).abs().max() < 1e-2 and model[0].weight.grad is not None


def test_islands_nest_end_with_an_exception_and_leave_autocast_as_it_was() -> None:
    low = torch.ones(2, dtype=BF16)
    with torch.autocast("cpu", dtype=BF16):
        with pytest.raises(KeyError), float32(), float32():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == F32
            raise KeyError
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16
    assert (low + low).dtype == BF16


def test_one_island_object_can_be_entered_again_inside_itself() -> None:
    island, low = float32(), torch.ones(2, dtype=BF16)
    with island:
        with island:
            pass
        assert (low + low).dtype == F32
    assert (low + low).dtype == BF16


def test_island_kept_on_a_module_is_copied_and_pickled() -> None:
    model = Scatters("context")
    copy.deepcopy(model)
    assert isinstance(pickle.loads(pickle.dumps(model)).island, float32)


def test_other_tensors_are_left_alone() -> None:
    with float32():
        assert (torch.ones(2, dtype=torch.float64) + 1).dtype == torch.float64
        assert (torch.ones(2, dtype=torch.long) + 1).dtype == torch.long
        assert torch.ones(2, dtype=BF16).half().dtype == torch.float16
