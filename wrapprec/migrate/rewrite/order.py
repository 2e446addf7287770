"""Whether one line with `wrap` serves all that an optimizer does: it is made once, and steps behind that line."""

from __future__ import annotations

from collections.abc import Sequence

from wrapprec.migrate.rewrite.facts import Reason, constant
from wrapprec.migrate.rewrite.names import Function, Names, Symbol
from wrapprec.migrate.rewrite.syntax import cst, each


def out_of_order(function: Function, after: cst.CSTNode, optimizers: Sequence[Symbol], names: Names) -> Reason | None:
    """Say which optimizer is made anew where `wrap` would not see it, or steps before, if one does.

    Args:
        function: where the line would be.
        after: the statement before the line.
        optimizers: roots.
        names: of the file.
    """
    for root in optimizers:
        for node, value in names.values.get(root, []):
            if constant(value) == "None" or _mentions(value, root, names):
                continue
            inside = node is after or any(up is after for up in names.above(node))
            if names.function(node) is not function or (names.line(node) > names.line(after) and not inside):
                words = f"`{root[1]}` is made anew here, and only one of the two would be wrapped"
                return Reason(node, words)
        for symbol in names.family(root):
            for use in names.uses[symbol]:
                here = names.function(use) is function and names.line(use) < names.line(after)
                if here and _steps(use, names):
                    return Reason(use, f"`{root[1]}` steps here, before the place where it could be wrapped")
    return None


def _mentions(value: cst.CSTNode, root: Symbol, names: Names) -> bool:
    """Whether a value is made of the thing itself: `optimizer = Lookahead(optimizer)`."""
    symbols = [names.symbol(node) for node in each(value) if isinstance(node, (cst.Name, cst.Attribute))]
    return any(symbol is not None and root in names.roots(symbol) for symbol in symbols)


def _steps(use: cst.CSTNode, names: Names) -> bool:
    up = names.parent(use)
    if isinstance(up, cst.Arg):
        call = names.parent(up)
        return isinstance(call, cst.Call) and isinstance(call.func, cst.Attribute) and call.func.attr.value == "step"
    return isinstance(up, cst.Attribute) and up.value is use and up.attr.value == "step"


def runs_often(function: Function, after: cst.CSTNode, models: Sequence[Symbol], names: Names) -> Reason | None:
    """Say why `wrap` could run twice for one model at a place, if it could."""
    loop = next((up for up in _inside(after, names) if isinstance(up, (cst.For, cst.While))), None)
    for root in models:
        own = [node for node, _ in names.values.get(root, []) if names.function(node) is function]
        if loop is not None and not any(loop in names.above(node) for node in own):
            return Reason(after, f"this runs in a loop, and the model `{root[1]}` is made outside of it")
        if own or function is None:
            continue
        calls = names.calls.get(function, [])
        many = len(calls) > 1 or any(isinstance(up, (cst.For, cst.While)) for call in calls for up in names.above(call))
        unknown = not calls and function.name.value != "__init__"
        if many or unknown:
            words = f"`{function.name.value}` may run more than once for the model `{root[1]}`"
            return Reason(after, words + ": call wrapprec.wrap where the model and its optimizer are made")
    return None


def _inside(after: cst.CSTNode, names: Names) -> list[cst.CSTNode]:
    found = []
    for up in names.above(after):
        if isinstance(up, cst.FunctionDef):
            break
        found.append(up)
    return found
