"""An error about dtypes names the module, its placement and the rule that mends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

FOUR = ["16-mixed", "16-module", "bf16-mixed", "bf16-module"]


class Fails(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.layer(x))


class Model(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), Fails(how))

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


def scatter(x: Tensor) -> Tensor:
    return torch.zeros(4, 4).index_add_(0, torch.arange(2), x)


def solve(x: Tensor) -> Tensor:
    return torch.linalg.inv(x.T @ x + 10 * torch.eye(4, dtype=x.dtype))


# Autocast runs linear algebra in float32 of its own accord.
CASES = [(policy, scatter) for policy in FOUR] + [(policy, solve) for policy in FOUR if policy.endswith("module")]


@pytest.mark.parametrize(("policy", "how"), CASES)
def test_dtype_error_names_module_placement_and_rule_and_keeps_its_cause(policy: str, how: Any) -> None:
    model = Model(how)
    wrapprec.wrap(model, policy=policy)
    with pytest.raises(wrapprec.DtypeMismatchError) as caught:
        model(torch.randn(2, 4))
    text = str(caught.value)
    low = "float16" if policy.startswith("16") else "bfloat16"
    assert '"block.1" (Fails)' in text and f"computes in {low}" in text and "decided by policy" in text
    assert 'Rule("block.1", "float32")' in text and "wrapprec.float32()" in text
    assert type(caught.value.__cause__) in (RuntimeError, NotImplementedError)
    assert str(caught.value.__cause__).splitlines()[0] in text
    assert isinstance(caught.value, RuntimeError)
    assert all(type(p) is nn.Parameter for m in model.modules() for p in m._parameters.values())


@pytest.mark.parametrize(("policy", "how"), CASES)
def test_rule_that_the_error_names_mends_it(policy: str, how: Any) -> None:
    model = Model(how)
    wrapprec.wrap(model, policy=policy, rules=[wrapprec.Rule("block.1", "float32")])
    model(torch.randn(2, 4))


def test_rule_that_decided_is_named() -> None:
    model = Model(scatter)
    wrapprec.wrap(model, policy="32-true", rules=[("block.*", "bf16-mixed")])
    with pytest.raises(wrapprec.DtypeMismatchError, match=r'rule 1: "block\.\*"'):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("policy", FOUR)
def test_errors_that_precision_has_no_part_in_stay_as_they_are(policy: str) -> None:
    def shapes(x: Tensor) -> Tensor:
        return x @ torch.ones(7, 7)

    def indices(x: Tensor) -> Tensor:
        return nn.functional.embedding(torch.ones(2, dtype=torch.float64), torch.ones(3, 3))

    def own(x: Tensor) -> Tensor:
        raise KeyError("dtype")

    for how, kind in ((shapes, RuntimeError), (indices, RuntimeError), (own, KeyError)):
        model = Model(how)
        wrapprec.wrap(model, policy=policy)
        with pytest.raises(kind) as caught:
            model(torch.randn(2, 4))
        assert type(caught.value) is kind


def test_nothing_is_explained_in_a_float32_model() -> None:
    model = Model(lambda x: x @ torch.ones(4, 4, dtype=torch.float64))
    wrapprec.wrap(model, policy="32-true")
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, 4))
    assert type(caught.value) is RuntimeError
