"""Loops that train and that no plan speaks of: each is reported, with the reason why it stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.facts import Reason, constant, mentions
from wrapprec.migrate.rewrite.found import is_optimizer, optimizers
from wrapprec.migrate.rewrite.names import Function, Names, Symbol
from wrapprec.migrate.rewrite.plain import manager_of
from wrapprec.migrate.rewrite.syntax import cst, each


def unspoken(plans: Sequence[Plan], names: Names, known: bool) -> list[Reason]:
    """Find the training that is neither rewritten nor left with a reason, one `backward()` a function.

    Args:
        plans: all that there are for the file.
        names: of the file.
        known: whether it uses wrapprec already.
    """
    touched = {id(node) for plan in plans for node in (*plan.edits, *plan.behind, *(one.node for one in plan.reasons))}
    ours, served = _ours(names), served_by(plans, names)
    touched |= {id(node) for node in ours}
    found: dict[Function, Reason] = {}
    for node in names.nodes:
        if not isinstance(node, cst.Call) or not _goes_backward(node):
            continue
        function = names.function(node)
        if function in found or not _trains(node, names) or _is_spoken_of(node, touched, served, names):
            continue
        words = _words(node, names)
        if words is not None or not known:  # what comes from elsewhere may be wrapped there
            found[function] = Reason(node, words or _elsewhere(names))
    return list(found.values()) if found or plans or known else _unknown(names)


def served_by(plans: Sequence[Plan], names: Names) -> set[Symbol]:
    """The roots of what is wrapped, by a plan or by the file as it is, and of what a plan leaves with a reason.

    Args:
        plans: all that there are for the file.
        names: of the file.
    """
    served = {root for plan in plans for root in plan.serves}
    for up in map(names.parent, _ours(names)):
        served |= {root for arg in up.args for root in mentions(arg, names)} if isinstance(up, cst.Call) else set()
    return served


def _ours(names: Names) -> list[cst.CSTNode]:
    return [node for node in names.nodes if isinstance(node, (cst.Name, cst.Attribute)) and _is_ours(node, names)]


def _is_ours(node: cst.CSTNode, names: Names) -> bool:
    """Whether a name is one of wrapprec that has to do with precision."""
    found = [one for one in names.qualified(node) if one.startswith("wrapprec.")]
    return any(not one.startswith("wrapprec.migrate.apex.") or ".apex.amp." in one for one in found)


def _elsewhere(names: Names) -> str:
    manager = manager_of(names, frozenset({"apex"}))  # whose amp has plans of its own
    return "which model and optimizer this loop trains is not known in this file" if manager is None else manager.words


def _unknown(names: Names) -> list[Reason]:
    """The optimizer that a file makes, where nothing of the file is known to step it."""
    calls = [node for node in names.nodes if isinstance(node, cst.Call)]
    made = [node for node in calls if is_optimizer(node, names)] if any(map(_goes_backward, calls)) else []
    return [Reason(node, "which loop steps this optimizer is not known in this file") for node in made[:1]]


def _goes_backward(call: cst.Call) -> bool:
    func = call.func
    if not isinstance(func, cst.Attribute) or func.attr.value != "backward":
        return False
    is_super = isinstance(func.value, cst.Call) and getattr(func.value.func, "value", "") == "super"
    return not is_super


def _around(node: cst.CSTNode, names: Names) -> cst.CSTNode:
    """The outermost loop around a node in its function; without one, the function or the file."""
    loop: cst.CSTNode | None = None
    for up in names.above(node):
        if isinstance(up, cst.FunctionDef):
            return up.body if loop is None else loop
        if isinstance(up, (cst.For, cst.While)):
            loop = up
    return names.module if loop is None else loop


def _trains(call: cst.Call, names: Names) -> bool:
    """Whether a `backward()` is in a loop, or beside a step; one alone asks for gradients."""
    code = _around(call, names)
    if isinstance(code, (cst.For, cst.While)):
        return True
    return bool(_stepped(code))


def _stepped(code: cst.CSTNode) -> list[cst.Call]:
    calls = [one for one in each(code) if isinstance(one, cst.Call) and isinstance(one.func, cst.Attribute)]
    return [one for one in calls if one.func.attr.value == "step"]  # type: ignore[attr-defined]


def _is_spoken_of(
    node: cst.CSTNode, touched: set[int], served: set[Symbol], names: Names, seen: frozenset[Function] = frozenset()
) -> bool:
    code = _around(node, names)
    if _is_touched(code, touched, names) or mentions(code, names) & served:
        return True
    function = names.function(node)
    if function is None or function in seen:
        return False
    calls = names.calls.get(function, [])
    return any(_is_spoken_of(call, touched, served, names, seen | {function}) for call in calls)


def _is_touched(
    code: cst.CSTNode, touched: set[int], names: Names, seen: frozenset[cst.FunctionDef] = frozenset()
) -> bool:
    for node in each(code):
        if id(node) in touched:
            return True
        called = names.called(node) if isinstance(node, cst.Call) else None
        if called is not None and called not in seen and _is_touched(called.body, touched, names, seen | {called}):
            return True
    return False


def _words(call: cst.Call, names: Names) -> str | None:
    """Why nothing is done about a loop whose optimizer the file makes."""
    made = set(optimizers(names))
    for step in _stepped(_around(call, names)):
        assert isinstance(step.func, cst.Attribute)
        symbol = names.symbol(step.func.value)
        roots = names.roots(symbol) if symbol is not None else frozenset()
        for root in roots:
            values = [value for _, value in names.values.get(root, [])]
            if any(isinstance(value, cst.IfExp) or constant(value) == "None" for value in values):
                return f"`{root[1]}`, which this loop steps, is made by a condition: call wrapprec.wrap behind it"
        if roots and roots <= made:
            return "this loop trains without mixed precision, in a file that uses it elsewhere: it stays as it is"
    return None
