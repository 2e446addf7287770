"""Scalers that a file uses and does not make: what they scale stays as it is."""

from __future__ import annotations

from collections.abc import Iterable

from wrapprec.migrate.rewrite.facts import Reason
from wrapprec.migrate.rewrite.found import optimizers
from wrapprec.migrate.rewrite.names import Function, Names, Symbol
from wrapprec.migrate.rewrite.syntax import cst, text

_HELPER = "call wrapprec.wrap where model and optimizer are made, take autocast away, give its GradScaler enabled=False"
"""By hand: a disabled GradScaler only steps, and its state is empty."""


def read_foreign(known: Iterable[Symbol], names: Names) -> list[tuple[Reason, set[Symbol]]]:
    """Find what scales a loss, unscales gradients or steps an optimizer, and is no GradScaler that is known.

    Args:
        known: the symbols of scalers that are read elsewhere.
        names: of the file.

    Returns:
        A reason for the first in each function, with the roots of the optimizers that are stepped there.
    """
    own, made = set(known), set(optimizers(names))
    first: dict[Function, set[Symbol]] = {}
    found: list[tuple[Reason, set[Symbol]]] = []
    for node in names.nodes:
        if not isinstance(node, cst.Call) or names.called(node) is not None or not node.args:
            continue
        symbols = [names.symbol(arg.value) for arg in node.args]
        roots = {root for symbol in symbols if symbol is not None for root in names.roots(symbol)} & made
        holder = _holder(node, bool(roots), names)
        if holder is not None and names.symbol(holder) not in own:
            function = names.function(node)
            if function not in first:
                first[function] = set()
                words = f"`{text(holder)}` scales here, and this file does not show what it does: {_HELPER}"
                if _is_shared(holder, names):
                    words = f"`{text(holder)}` is made in the body of the class, not where the optimizer is made"
                found.append((Reason(node, words), first[function]))
            first[function] |= roots
    return found


def _is_shared(holder: cst.BaseExpression, names: Names) -> bool:
    """Whether an attribute of `self` is one of the class."""
    symbol = names.symbol(holder) if isinstance(holder, cst.Attribute) else None
    owner = symbol[0] if symbol is not None else None
    shared = [one for one in names.values if names.in_class(one) and getattr(one[0], "node", None) is owner]
    return symbol is not None and symbol not in names.values and any(one[1] == symbol[1] for one in shared)


def _holder(call: cst.Call, steps: bool, names: Names) -> cst.BaseExpression | None:
    """What holds the scaler in a call that uses one, if it does."""
    func, up = call.func, names.parent(call)
    name = func.attr.value if isinstance(func, cst.Attribute) else getattr(func, "value", "")
    if isinstance(func, cst.Attribute):
        goes_back = isinstance(up, cst.Attribute) and up.attr.value == "backward"
        if name == "unscale_" or (name == "scale" and goes_back) or (name == "step" and steps):
            return func.value
    is_scaler = steps and isinstance(name, str) and name.lower().endswith("scaler")
    return func if is_scaler else None  # timm's way: loss_scaler(loss, optimizer)
