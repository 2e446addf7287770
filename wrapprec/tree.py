"""The containers that activations travel in: map the tensors in them, keeping every type and identity."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

TensorMap: TypeAlias = Callable[[Tensor], Tensor]

Part: TypeAlias = tuple[str, Any, Any]
"""Where a value stands (`index`, `key`, `attribute` or `own` `__dict__`), under which key, and the value."""

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
_SIMPLE_DEPTH = 8
_MISSING = object()


class _NotSimple(Exception):
    """The tree holds more than exact tuples, lists and dicts."""


def map_tensors(fn: TensorMap, tree: Any) -> Any:
    """Replace every tensor in a tree by `fn(tensor)`, building new containers only where something changed.

    Args:
        fn: returns the tensor itself where there is nothing to do; called once for each distinct tensor.
        tree: what `cast_tree` takes; containers may contain themselves.

    Returns:
        A tree of the same types; the one given when nothing changed. Dataclasses are copied without `__init__`.

    >>> pair = (torch.ones(1), "text")
    >>> map_tensors(lambda t: t, pair) is pair
    True
    >>> map_tensors(torch.neg, pair)
    (tensor([-1.]), 'text')
    """
    if isinstance(tree, Tensor):
        return fn(tree)
    done: dict[Tensor, Tensor] = {}
    try:
        return _map_simple(fn, tree, done, 0)[0]
    except _NotSimple:
        return _map_graph(fn, tree, done)


def _map_simple(fn: TensorMap, tree: Any, done: dict[Tensor, Tensor], depth: int) -> tuple[Any, bool]:
    """Map a tree of exact tuples, lists and dicts: what nearly every module call passes.

    Returns:
        The tree, and whether it is a new one: dynamo (torch 2.13) cannot compare tuples with `is`.

    Raises:
        _NotSimple: there is another kind of container, or so much nesting that there may be a cycle.
    """
    kind = type(tree)
    if kind is dict:
        values: Any = tree.values()
    elif kind is tuple or kind is list:
        values = tree
    elif kind in _ATOMS:
        return tree, False
    else:
        raise _NotSimple
    if depth == _SIMPLE_DEPTH:
        raise _NotSimple
    changed = False
    mapped = []
    for value in values:
        if isinstance(value, Tensor):
            if value not in done:
                done[value] = fn(value)
            new = done[value]
            changed = changed or new is not value
        elif value is None or type(value) in _ATOMS:
            new = value
        else:
            new, other = _map_simple(fn, value, done, depth + 1)
            changed = changed or other
        mapped.append(new)
    if not changed:
        return tree, False
    if kind is dict:
        return dict(zip(tree, mapped, strict=True)), True
    return (tuple(mapped) if kind is tuple else mapped), True


def is_atom(value: object) -> bool:
    """Say whether a value holds no activations and is never looked into."""
    return type(value) in _ATOMS or isinstance(value, (str, type, nn.Module))


def field_names(value: Any) -> list[str]:
    """Names of the dataclass fields; empty for anything but a dataclass instance."""
    if not hasattr(type(value), "__dataclass_fields__"):
        return []
    return [field.name for field in dataclasses.fields(value)]


def is_container(value: Any) -> bool:
    """Say whether a value is a container that `map_tensors` rebuilds."""
    if isinstance(value, (tuple, list, dict, deque, UserDict)):
        return not is_atom(value)
    return bool(field_names(value)) and not is_atom(value)


def parts(node: Any) -> Iterator[Part]:
    """Every value that a container holds, and where."""
    if isinstance(node, UserDict):
        yield "attribute", "data", node.data
    elif isinstance(node, dict):
        for key, value in list(dict.items(node)):
            yield "key", key, value
    elif isinstance(node, (tuple, list, deque)):
        for index, value in enumerate(list(node)):
            yield "index", index, value
    for name in field_names(node):
        value = _field(node, name)
        if value is not _MISSING:
            yield "attribute", name, value


def _field(node: Any, name: str) -> Any:
    try:
        return getattr(node, name, _MISSING)
    except Exception:  # a field that refuses to be read (a config whose layers differ) holds no activations
        return _MISSING


def put(node: Any, where: str, key: Any, value: Any) -> None:
    """Write into a container past whatever its class does on writing (frozen, registered, mirrored)."""
    if where == "index":
        node[key] = value
    elif where == "own":
        vars(node)[key] = value
    elif where == "attribute":
        object.__setattr__(node, key, value)
    elif isinstance(node, OrderedDict):
        OrderedDict.__setitem__(node, key, value)
    else:
        dict.__setitem__(node, key, value)


def copy_container(node: Any) -> Any:
    """Copy a mutable container without calling its `__init__`, which may validate, mirror or count."""
    if isinstance(node, dict) and type(node) is not dict:
        new = type(node).__new__(type(node))
        if hasattr(node, "default_factory") and hasattr(new, "default_factory"):
            new.default_factory = node.default_factory
        for key, value in dict.items(node):
            put(new, "key", key, value)
        if hasattr(node, "__dict__"):
            vars(new).update(vars(node))
        return new
    return copy.copy(node)


def rebuild_tuple(node: tuple[Any, ...], items: list[Any]) -> Any:
    """Make a tuple of the same type as `node` from other items."""
    kind: Any = type(node)
    if kind is tuple:
        return tuple(items)
    if hasattr(kind, "n_sequence_fields"):  # torch.return_types: tuple.__new__ refuses these
        return kind(items)
    # A namedtuple's own `__new__` may want other arguments: PackedSequence's does.
    new = tuple.__new__(kind, items)
    if hasattr(node, "__dict__"):
        vars(new).update(vars(node))
    return new


def _map_graph(fn: TensorMap, root: Any, done: dict[Tensor, Tensor]) -> Any:
    """Map any tree, also one with cycles, in three passes and without deep recursion.

    Find the containers and who holds them; mark those from which a changed tensor can be reached; copy the marked
    ones. Mutable copies exist before they are filled, which is what closes a cycle.
    """
    nodes: dict[int, Any] = {}
    holders: dict[int, list[int]] = {}
    dirty: list[int] = []
    todo = [root] if is_container(root) else []
    while todo:
        node = todo.pop()
        if id(node) in nodes:
            continue
        nodes[id(node)] = node
        for _, _, value in parts(node):
            if isinstance(value, Tensor):
                if value not in done:
                    done[value] = fn(value)
                if done[value] is not value:
                    dirty.append(id(node))
            elif is_container(value):
                holders.setdefault(id(value), []).append(id(node))
                todo.append(value)
    marked: set[int] = set()
    while dirty:
        key = dirty.pop()
        if key not in marked:
            marked.add(key)
            dirty.extend(holders.get(key, ()))
    built = {key: copy_container(nodes[key]) for key in marked if not isinstance(nodes[key], tuple)}

    def new(value: Any) -> Any:
        if isinstance(value, Tensor):
            return done[value]
        if id(value) in marked and id(value) not in built:
            built[id(value)] = rebuild_tuple(value, [new(item) for item in value])
        return built.get(id(value), value)

    for key, shell in list(built.items()):
        for where, name, value in parts(nodes[key]):
            put(shell, where, name, new(value))
    return new(root)
