"""Which models an optimizer trains: those that own its parameters."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


def params_of(optimizers: Iterable[Optimizer]) -> set[int]:
    """The ids of the parameters that optimizers step."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def params_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """Give a module's parameters; its class may have given the name `parameters` to something else, such as groups.

    Args:
        module: any.

    Yields:
        Each once.
    """
    for _, param in nn.Module.named_parameters(module):
        yield param


def roots_of(module: nn.Module, needed: set[int], live: Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """Find the models that own an optimizer's parameters.

    Args:
        module: one that is called, and owns some of them.
        needed: the ids of all of them.
        live: where to look for others; None: every module that there is in this process.

    Returns:
        The module itself if it owns them all. Otherwise the smallest module around it that owns the most of them, and
        others for the rest.

    >>> import torch
    >>> encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
    >>> roots_of(encoder, params_of([optimizer])) == [encoder, decoder]
    True
    """
    owned = {id(param) for param in params_in(module)}
    if needed <= owned:
        return [module]
    if live is None:
        # `type`, not `isinstance`: lazy proxies would be woken up. Some were never built to the end.
        live = [one for one in gc.get_objects() if issubclass(type(one), nn.Module) and "_modules" in vars(one)]
    owners = [(one, {id(p) for p in params_in(one)}, {id(m) for m in one.modules()}) for one in live]
    around = [owner for owner in owners if id(module) in owner[2]]
    roots = [_best(around, needed)]
    while rest := needed - set().union(*(root[1] for root in roots)):
        taken = set().union(*(root[2] for root in roots))
        others = [o for o in owners if o[1] & rest and not o[2] & taken]
        if not others:
            break
        roots.append(_best(others, rest))
    return [root[0] for root in roots]


def _best(owners: list[Any], needed: set[int]) -> Any:
    return min(owners, key=lambda owner: (-len(owner[1] & needed), len(owner[1]), len(owner[2])))
