"""Find, and replace in place, tensors inside the objects that a tree walk takes for one leaf."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wrapprec.tree import Part, TensorMap, is_atom, is_container, parts, put, rebuild_tuple

MAX_DEPTH = 6
"""How many opaque objects may stand inside one another before the search gives up."""

_CLOSED: tuple[type, ...] = (
    nn.Module,
    torch.optim.Optimizer,
    torch.utils.data.Dataset,
    enum.Enum,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
)
# Their objects lead far away (a logger to the root logger, a lock to its threads) and hold no activations.
_CLOSED_PACKAGES = frozenset(
    {"_thread", "asyncio", "builtins", "collections", "concurrent", "functools", "io", "logging", "multiprocessing"}
    | {"numpy", "pandas", "pathlib", "re", "threading", "torch", "weakref", "wrapprec"}
)
_OPEN_PACKAGE = "torch.distributions"


def tensors_in(tree: Any, deep: bool = False) -> list[Tensor]:
    """List the tensors in a tree, each once, in the order in which they stand.

    Args:
        tree: anything; the containers are those of `map_tensors`.
        deep: search the attributes of other objects too, at most `MAX_DEPTH` of them inside one another. Modules,
            optimizers, data sets, classes, functions and the attributes of tensors are not searched.

    Returns:
        The tensors themselves.

    >>> import torch
    >>> normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    >>> len(tensors_in([normal])), len(tensors_in([normal], deep=True))
    (0, 2)
    """
    found: dict[int, Tensor] = {}
    seen: dict[int, Any] = {}
    todo: list[tuple[Any, int]] = [(tree, 0)]
    while todo:
        node, depth = todo.pop()
        if isinstance(node, Tensor):
            found.setdefault(id(node), node)
            continue
        inside = is_container(node)
        if id(node) in seen or not (inside or (deep and depth < MAX_DEPTH and _is_open(node))):
            continue
        seen[id(node)] = node
        values = [value for _, _, value in (_contents(node) if deep else parts(node))]
        todo.extend((value, depth if inside else depth + 1) for value in reversed(values))
    return list(found.values())


def opaque_in(tree: Any) -> list[Any]:
    """List the outermost objects in a tree that a tree walk takes for leaves, but that may hold tensors.

    >>> import torch
    >>> normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    >>> opaque_in([torch.zeros(1), {"a": normal}, "text"]) == [normal]
    True
    """
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    todo = [tree]
    while todo:
        node = todo.pop()
        if is_atom(node) or isinstance(node, Tensor) or id(node) in seen:
            continue
        if is_container(node):
            seen[id(node)] = node
            todo.extend(value for _, _, value in parts(node))
        elif _is_open(node):
            found[id(node)] = node
    return list(found.values())


def mend(fn: TensorMap, obj: Any) -> Any:
    """Replace every tensor that can be reached from an object by `fn(tensor)`, in place.

    Attributes, dict values and list items are assigned; tuples and frozen dataclasses on the way are rebuilt and
    assigned in their turn. It reaches exactly what `tensors_in(obj, deep=True)` lists.

    Args:
        fn: returns the tensor itself where there is nothing to do; called once for each distinct tensor.
        obj: anything.

    Returns:
        The object itself, or its replacement where it is a tensor, a tuple or frozen.

    >>> import torch
    >>> normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    >>> mend(torch.neg, normal) is normal, normal.scale
    (True, tensor([-1., -1.]))
    """
    return _Mender(fn).mend(obj, 0)


class _Mender:
    """One run of `mend`: what has been replaced so far, by the identity of the original."""

    def __init__(self, fn: TensorMap) -> None:
        self.fn = fn
        self.done: dict[int, tuple[Any, Any]] = {}

    def mend(self, node: Any, depth: int) -> Any:
        if id(node) in self.done:
            return self.done[id(node)][1]
        if isinstance(node, Tensor):
            return self._remember(node, self.fn(node))
        inside = is_container(node)
        if not (inside or (depth < MAX_DEPTH and _is_open(node))):
            return node
        deeper = depth if inside else depth + 1
        if isinstance(node, tuple):
            return self._mend_tuple(node, deeper)
        frozen = getattr(getattr(type(node), "__dataclass_params__", None), "frozen", False)
        target = self._remember(node, copy.copy(node) if frozen else node)
        changed = False
        for where, key, value in list(_contents(node)):
            new = self.mend(value, deeper)
            if new is not value:
                put(target, where, key, new)
                changed = True
        return target if changed else self._remember(node, node)

    def _mend_tuple(self, node: tuple[Any, ...], depth: int) -> Any:
        items = [self.mend(item, depth) for item in node]
        if id(node) in self.done:  # a cycle through this tuple has rebuilt it already
            return self.done[id(node)][1]
        same = all(new is old for new, old in zip(items, node, strict=True))
        return self._remember(node, node if same else rebuild_tuple(node, items))

    def _remember(self, node: Any, new: Any) -> Any:
        self.done[id(node)] = (node, new)  # holding the original keeps its id from being given away
        return new


def _is_open(value: Any) -> bool:
    """Say whether the attributes of an opaque object may be searched."""
    if is_atom(value) or isinstance(value, _CLOSED):
        return False
    home = type(value).__module__
    return home.partition(".")[0] not in _CLOSED_PACKAGES or home.startswith(_OPEN_PACKAGE)


def _contents(node: Any) -> Iterator[Part]:
    """Every value that an object holds: container items, and attributes in `__dict__` and `__slots__`."""
    for where, key, value in parts(node):
        if where != "attribute":
            yield where, key, value
    if type(node) in (tuple, list, dict):
        return
    for name, value in list(getattr(node, "__dict__", {}).items()):
        yield "own", name, value
    for kind in type(node).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if name in ("__dict__", "__weakref__"):
                continue
            try:
                yield "attribute", name, object.__getattribute__(node, name)
            except AttributeError:
                continue
