"""Finds the tensors that leave a scope by other ways than its outputs: inside objects, and as module attributes."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from wrapprec import levels
from wrapprec.cast import map_tensors, mend, tensors_in
from wrapprec.lent import FORMER

_CONTAINERS = (list, tuple, dict, set)
_ATOMS = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device)
_SKIPPED = frozenset(_ATOMS)
_PLAIN = (Tensor, nn.Module, *_ATOMS)
_NOT_SEARCHED = frozenset(nn.Module().__dict__) | {
    "forward",
    FORMER,
    "_flat_weights",
    "_flat_weight_refs",
    "_flat_weights_names",
    "_all_weights",
}


def once(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply `fn` once to each floating tensor that requires grad, and give equal results for the same tensor."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    results: set[int] = set()

    def apply(tensor: Tensor) -> Tensor:
        if not levels.requires_grad(tensor) or id(tensor) in results:
            return tensor
        if id(tensor) not in made:
            result = fn(tensor)
            made[id(tensor)] = tensor, result
            results.add(id(result))
        return made[id(tensor)][1]

    return apply


def _is_plain(value: Any) -> bool:
    """Nothing in it but tensors and atoms at its first levels: there is nothing that a tree walk has not seen."""
    if isinstance(value, _PLAIN):
        return True
    if type(value) in (tuple, list):
        return all(isinstance(item, _PLAIN) or _is_plain(item) for item in value)
    return type(value) is dict and all(isinstance(item, _PLAIN) or _is_plain(item) for item in value.values())


def mend_opaque(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Replace the tensors inside an output's containers and objects, in place; plain trees were dealt with already."""
    return tree if _is_plain(tree) else mend(fn, tree)


def mend_given(fn: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Replace the tensors that forward has put into objects and containers that were passed in, in place."""
    for value in (*args, *kwargs.values()):
        if not isinstance(value, _PLAIN):
            mend(fn, value)


def map_outputs(fn: Callable[[Tensor], Tensor], out: Any) -> Any:
    """Replace the tensors of an output; one that is a view of another stays a view of it.

    Args:
        fn: called once for each tensor.
        out: any tree.
    """
    if isinstance(out, Tensor):
        return fn(out)
    tensors = tensors_in(out)
    bases = {id(t) for t in tensors}
    if all(t._base is None or id(t._base) not in bases for t in tensors):
        return map_tensors(fn, out)
    made: dict[int, Tensor] = {}

    def apply(tensor: Tensor) -> Tensor:
        base = tensor._base
        if base is not None and id(base) in bases:
            whole = apply(base)
            if whole is base:
                return tensor
            if whole.stride() == base.stride():
                # A write into the one must show in the other, as it does in plain torch. XLA's tensors do not know
                # their strides: there, only the operations that made the view tell what it shows.
                view: Tensor = tensor._view_func_unsafe(whole)
                return view
        if id(tensor) not in made:
            made[id(tensor)] = fn(tensor)
        return made[id(tensor)]

    return map_tensors(apply, out)


def mend_attributes(
    fn: Callable[[Tensor], Tensor], module: nn.Module, seen: set[int], only: Container[str] | None = None
) -> list[str]:
    """Replace the tensors in the attributes and buffers of `module`: what forward left there.

    Args:
        fn: puts the border on a tensor that is new, and gives back others.
        module: whose attributes are searched; containers and objects there, too.
        seen: the ids of the objects that another module of the scope holds too, and that were searched.
        only: the attributes whose objects are searched; None for all.

    Returns:
        The names of the attributes with objects in which a tensor requires grad.
    """
    own = module.__dict__
    holders = []
    former = own.get(FORMER, ())
    for key in [key for key in own if key not in _NOT_SEARCHED]:
        value = own[key]
        if type(value) in _SKIPPED or key in former or isinstance(value, _ATOMS):
            continue
        if isinstance(value, Tensor):
            if levels.requires_grad(value):
                own[key] = fn(value)
        elif isinstance(value, _CONTAINERS):
            if any(not isinstance(item, _ATOMS) for item in _items(value)):
                after = mend(fn, value)
                if after is not value:
                    own[key] = after
        elif not isinstance(value, nn.Module) and id(value) not in seen and (only is None or key in only):
            seen.add(id(value))
            watch = _Watch(fn)
            mend(watch, value)
            if watch.met:
                holders.append(key)
    buffers = own["_buffers"]
    for key, value in buffers.items() if buffers else ():
        if value is not None and levels.requires_grad(value):
            buffers[key] = fn(value)
    return holders


class _Watch:
    """Applies a function, and remembers whether it met a tensor that requires grad."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn
        self.met = False

    def __call__(self, tensor: Tensor) -> Tensor:
        self.met = self.met or tensor.requires_grad
        return self.fn(tensor)


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
