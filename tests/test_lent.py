"""Lent weights: what a thread sees in a module's parameters, and what is there afterwards."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from wrapprec.lent import Lent, lend, originals, take_back


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(2, 2)


def in_thread(function: Any) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(10)
    return results[0]


def test_only_the_borrowing_thread_sees_what_is_lent(layer: nn.Linear) -> None:
    weight, low = layer.weight, torch.zeros(2, 2)
    weights = {"weight": low}
    lend(layer, weights)
    assert layer.weight is low and dict(layer.named_parameters())["weight"] is low
    assert layer._parameters.get("weight") is low and layer._parameters.copy()["weight"] is low
    assert originals(layer)["weight"] is weight and layer.bias is originals(layer)["bias"]
    assert in_thread(
        lambda: (layer.weight is weight, layer.state_dict()["weight"].data_ptr() == weight.data_ptr())
    ) == (
        True,
        True,
    )
    take_back(layer, weights)
    assert layer.weight is weight and type(layer._parameters) is dict


def test_the_very_same_dict_comes_back_whatever_the_order_of_threads(layer: nn.Linear) -> None:
    own = layer._parameters
    mine: dict[str, Any] = {"weight": torch.zeros(2, 2)}
    ready, done = threading.Event(), threading.Event()

    def other() -> None:
        theirs: dict[str, Any] = {"weight": torch.ones(2, 2)}
        lend(layer, theirs)
        ready.set()
        done.wait(10)
        assert layer.weight is theirs["weight"]
        take_back(layer, theirs)

    lend(layer, mine)
    thread = threading.Thread(target=other)
    thread.start()
    assert ready.wait(10) and layer.weight is mine["weight"]
    take_back(layer, mine)
    assert isinstance(layer._parameters, Lent) and layer.weight is own["weight"]
    done.set()
    thread.join(10)
    assert layer._parameters is own


def test_loans_nest_and_a_second_take_back_does_nothing(layer: nn.Linear) -> None:
    own, outer, inner = layer._parameters, {"weight": torch.zeros(2, 2)}, {"weight": torch.ones(2, 2)}
    lend(layer, outer)
    lend(layer, inner)
    assert layer.weight is inner["weight"]
    take_back(layer, inner)
    take_back(layer, inner)
    assert layer.weight is outer["weight"]
    take_back(layer, outer)
    take_back(layer, outer)
    assert layer._parameters is own
    take_back(layer, {"weight": torch.ones(2, 2)})


def test_parameter_that_forward_assigns_is_kept_and_swaps_are_not(layer: nn.Linear) -> None:
    weight, weights = layer.weight, {"weight": torch.zeros(2, 2)}
    lend(layer, weights)
    functional_call(layer, {"weight": torch.ones(2, 2)}, (torch.ones(1, 2),))
    assert layer.weight is weights["weight"]
    new = nn.Parameter(torch.ones(2, 2))
    layer.bias = nn.Parameter(torch.ones(2))
    take_back(layer, weights)
    assert layer.weight is weight and layer.bias.tolist() == [1, 1]
    weights = {"weight": torch.zeros(2, 2)}
    lend(layer, weights)
    layer.weight = new
    take_back(layer, weights)
    assert layer.weight is new and next(iter(layer.parameters())) is new


def test_deleted_added_and_popped_parameters_follow(layer: nn.Linear) -> None:
    weights = {"weight": torch.zeros(2, 2)}
    lend(layer, weights)
    del layer.bias
    layer.register_parameter("extra", nn.Parameter(torch.ones(1)))
    layer._parameters.pop("weight")
    with pytest.raises(KeyError):
        layer._parameters.pop("weight")
    take_back(layer, weights)
    assert list(layer._parameters) == ["extra"]


def test_copies_and_pickles_made_meanwhile_hold_the_originals(layer: nn.Linear) -> None:
    weights = {"weight": torch.zeros(2, 2)}
    lend(layer, weights)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other._parameters) is dict and type(other.weight) is nn.Parameter
        assert torch.equal(other.weight, originals(layer)["weight"])
    take_back(layer, weights)


def test_lists_of_a_recurrent_module_come_back() -> None:
    lstm = nn.LSTM(2, 2)
    flat, refs = lstm._flat_weights, lstm._flat_weight_refs
    weights = {name: p.detach() * 1 for name, p in lstm.named_parameters()}
    lend(lstm, weights)
    lstm(torch.ones(1, 2))
    take_back(lstm, weights)
    assert lstm._flat_weights is flat and lstm._flat_weight_refs is refs
    assert all(a is b for a, b in zip(flat, lstm.parameters(), strict=True))
