"""Finds forwards that fill tensors with numbers past the range of a dtype, such as masks with finfo(float32).min.

torch refuses such a fill ("value cannot be converted to type at::Half without overflow"), and arithmetic with such a
number makes inf and then nan. Only the source can tell before it happens.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import tokenize
import weakref
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

Finding = tuple[str, float]
"""What a forward uses, as text, and its magnitude."""

_LARGEST = torch.finfo(torch.float32).max
_LEAST = torch.finfo(torch.float16).max
_WIDE = frozenset({"torch.float32", "torch.float", "torch.float64", "torch.double"})
_FILLS = frozenset({"masked_fill", "masked_fill_", "fill_", "full_like", "new_full"})
_HARMLESS = frozenset({"eps", "tiny", "smallest_normal", "resolution", "bits", "dtype"})
_NOT_ENTERED = frozenset({"torch", "builtins", "math", "typing"})
_DEPTH = 3

_found: weakref.WeakKeyDictionary[Any, tuple[Finding, ...]] = weakref.WeakKeyDictionary()


def overfill(module: nn.Module, dtype: torch.dtype) -> str | None:
    """Say which number of a module's own forward is past the range of a dtype.

    The methods and functions that forward calls by name are looked at, too; torch's own modules are not.

    Args:
        module: any module.
        dtype: float16 or bfloat16; bfloat16 ends a little below float32, so that finfo(float32).min is past it.

    Returns:
        The number as it is written, or None; also None where the source cannot be read.

    >>> overfill(nn.Linear(2, 2), torch.float16) is None
    True
    """
    kind: Any = type(module)
    if kind not in _found:
        _found[kind] = tuple(_findings(kind))
    largest = torch.finfo(dtype).max
    return next((text for text, magnitude in _found[kind] if magnitude > largest), None)


def _findings(kind: Any) -> Iterator[Finding]:
    forward = getattr(kind, "forward", None)
    if not callable(forward):
        return
    for tree, names in _reached(kind, forward, set(), _DEPTH):
        yield from _numbers(tree, names)
        yield from _foreign_limits(tree)


def _reached(kind: Any, function: Any, seen: set[Any], depth: int) -> Iterator[tuple[ast.AST, dict[str, Any]]]:
    """The syntax trees and globals of a function, and of what it calls or hands on: methods of the class, functions."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    if function.__module__ is None or function.__module__.partition(".")[0] in _NOT_ENTERED:
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError, tokenize.TokenError):
        return
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    body = ast.Module(body=tree.body, type_ignores=[])
    yield body, function.__globals__
    if depth == 0:
        return
    for call in ast.walk(body):
        if not isinstance(call, ast.Call):
            continue
        # What is given to a call may be called there: `checkpoint(self.block, x)`.
        for called in (call.func, *call.args):
            if isinstance(called, ast.Name):
                yield from _reached(kind, function.__globals__.get(called.id), seen, depth - 1)
            elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
                yield from _reached(kind, inspect.getattr_static(kind, called.attr, None), seen, depth - 1)


def _numbers(tree: ast.AST, names: dict[str, Any]) -> Iterator[Finding]:
    """Literals, constants of the file, and limits of the wide dtypes."""
    harmless = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in _HARMLESS}
    for node in ast.walk(tree):
        value = None
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            value = node.value
        elif isinstance(node, ast.Name) and isinstance(names.get(node.id), float):
            value = abs(names[node.id])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            # Whole numbers are indices and sizes, unless they are negative.
            value = _whole(node.operand)
        if value is not None and _LEAST < value < math.inf:
            yield ast.unparse(node), value
        argument = _finfo(node)
        if argument is not None and id(node) not in harmless and ast.unparse(argument) in _WIDE:
            yield ast.unparse(node), _LARGEST


def _whole(node: ast.AST) -> float | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return float(min(node.value, int(_LARGEST)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _whole(node.left), _whole(node.right)
        if base is not None and exponent is not None and 1 < base <= 16 and exponent <= 100:
            return float(min(base**exponent, _LARGEST))
    return None


def _foreign_limits(tree: ast.AST) -> Iterator[Finding]:
    """Fills of one tensor with the limit of another's dtype, which may be wider."""
    assigned = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        filled, values = _fill(node)
        receiver = None if filled is None else _of_dtype(filled)
        if receiver is None:
            continue
        for value in values:
            meant = assigned.get(value.id, value) if isinstance(value, ast.Name) else value
            for below in ast.walk(meant):
                argument = _finfo(below)
                if isinstance(argument, ast.Name):
                    argument = assigned.get(argument.id, argument)
                if not isinstance(argument, ast.Attribute) or argument.attr != "dtype":
                    continue
                owner = ast.unparse(argument.value)
                if owner != ast.unparse(receiver):
                    yield f"{ast.unparse(below)} in {ast.unparse(receiver)}", _LARGEST


def _fill(node: ast.AST) -> tuple[ast.AST | None, list[ast.expr]]:
    """The tensor that a node fills, and what may be the value."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _FILLS:
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            return (values[0], values[1:]) if values else (None, [])
        return node.func.value, values
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        return node.targets[0].value, [node.value]
    return None, []


def _of_dtype(node: ast.AST) -> ast.AST | None:
    """The tensor whose dtype a filled one has; None where it is a wide one for sure."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in ("float", "double"):
            return None
        if node.func.attr == "type_as" and node.args:
            return node.args[0]
        if node.func.attr == "to" and node.args and isinstance(node.args[0], ast.Attribute):
            return node.args[0].value if node.args[0].attr == "dtype" else node
    return node


def _finfo(node: ast.AST) -> ast.expr | None:
    """The argument, if a node calls `finfo`."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return node.args[0] if name == "finfo" else None
