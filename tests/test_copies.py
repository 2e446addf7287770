"""Modules that were copied shallowly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wrapprec
from wrapprec import wrap

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

POLICIES = [("16-mixed", 1024.0), ("16-module", 1024.0), ("bf16-mixed", None), ("bf16-module", None), ("32-true", None)]


@pytest.mark.parametrize(("policy", "scale"), POLICIES, ids=str)
def test_shallow_copy_runs_its_own_modules(policy, scale):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    wrap(model, policy=policy, loss_scale=scale)
    x = torch.ones(3, 4)
    model(x)
    other = copy.copy(model)
    other._modules = {**model._modules, "1": nn.Linear(4, 5)}
    plain = nn.Sequential(copy.deepcopy(model[0]), copy.deepcopy(other._modules["1"]))
    wrapprec.unwrap(plain[0]) if wrapprec.handle_of(plain[0]) else None
    assert other(x).shape == (3, 5) and model(x).shape == (3, 2)
    other(x).pow(2).sum().backward()
    plain(x).pow(2).sum().backward()
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        # A few roundings of 2**-9 (bf16) or less.
        assert (mine.grad - theirs.grad).norm() <= 0.03 * theirs.grad.norm()


def test_shallow_copy_of_a_submodule_put_into_the_model_is_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrap(model, policy="bf16-module")
    model(torch.ones(1, 4))
    twin = copy.copy(model[1])
    twin._parameters = {"weight": nn.Parameter(torch.zeros(4, 4)), "bias": nn.Parameter(torch.zeros(4))}
    model.append(twin)
    assert model(torch.ones(1, 4)).abs().sum() == 0
