"""What `wrapprec run` and `amp.init` replace in torch to be told of optimizers and calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import wrapprec
from wrapprec.migrate.find import Finder
from wrapprec.migrate.watch import builds, calls

PLAIN = Optimizer.__init__, nn.Module.__call__


def _there() -> tuple[Any, Any]:
    return Optimizer.__init__, nn.Module.__call__


@pytest.fixture(autouse=True)
def _nobody_watches() -> Iterator[None]:
    assert _there() == PLAIN
    yield
    for watcher in builds.watchers:
        watcher.remove()
    nn.Module.__call__ = PLAIN[1]  # type: ignore[method-assign]
    assert _there() == PLAIN


def _finders(number: int) -> list[Finder]:
    return [Finder("bf16-mixed", lambda text: None) for _ in range(number)]


def _train(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("ends", list(itertools.permutations(range(3))))
def test_torch_is_as_before_in_whatever_order_watchers_end(ends: tuple[int, ...]) -> None:
    finders = _finders(3)
    for finder in finders:
        finder.install()
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    for number in ends:
        assert all(now is not before for now, before in zip(_there(), PLAIN, strict=True))
        finders[number].remove()
        assert not finders[number].is_installed
    assert _there() == PLAIN
    for finder in finders:  # once more
        finder.remove()
    assert _there() == PLAIN and optimizer.param_groups


def test_the_later_watcher_comes_first_also_where_the_earlier_one_began_again() -> None:
    first, second = _finders(2)
    old = nn.Linear(2, 2)
    early = torch.optim.SGD(old.parameters(), lr=0.1)
    first.install()
    second.install()
    second.expect(early)  # the second watches calls, the first does not yet
    model = nn.Linear(2, 2)
    _train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    handle = wrapprec.handle_of(model)
    assert [found.handle for found in second.found] == [handle] and first.models() == []  # its script's own
    _train(old, early)
    assert wrapprec.handle_of(old) is not None and nn.Module.__call__ is PLAIN[1]


def test_tracing_by_fx_while_models_are_sought_leaves_no_watch_behind() -> None:
    [finder] = _finders(1)
    finder.install()
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    looks: list[nn.Module] = []
    look = finder.look_at
    finder.look_at = lambda module: (looks.append(module), look(module))[1]  # type: ignore[assignment, func-returns-value]

    class Ends(torch.fx.Tracer):
        def call_module(self, m: nn.Module, *rest: Any) -> Any:
            calls.discard(finder)  # as where a model is found within
            return super().call_module(m, *rest)

    Ends().trace(model)
    looks.clear()
    _train(model, optimizer)
    assert looks == [] and wrapprec.handle_of(model) is None
    finder.expect(optimizer)
    _train(model, optimizer)
    assert looks == [model] and wrapprec.handle_of(model) is not None
