"""Parameters and arguments that hand a scaler or context on: they go, or hand the handle on instead."""

from __future__ import annotations

from collections.abc import Callable

from wrapprec.migrate.rewrite.edits import Plan, expression
from wrapprec.migrate.rewrite.names import Expression, Names, Symbol
from wrapprec.migrate.rewrite.syntax import cst


def pass_on(
    family: list[Symbol],
    wanted: set[Expression],
    spell: Callable[[Expression], str] | None,
    plan: Plan,
    names: Names,
) -> set[Symbol]:
    """Edit the parameters, arguments and aliases of something that goes.

    Args:
        family: the symbols that hold it.
        wanted: the uses that need the handle in its place.
        spell: the handle's name in the place of a use; None where nothing is handed on.
        plan: gets the edits.
        names: of the file.

    Returns:
        The symbols that hold the handle then.
    """
    needed = {symbol for symbol in family if any(use in wanted for use in names.uses[symbol])}
    before = -1
    while len(needed) != before:  # who hands it to one that needs it needs it, too
        before = len(needed)
        for symbol in list(needed):
            sources = [*names.sites.get(symbol, []), *(value for _, value in names.values.get(symbol, []))]
            needed |= {one for one in map(names.symbol, sources) if one is not None and one in family}
    for symbol in family:
        function = names.params.get(symbol)
        if function is not None and symbol not in names.values:
            _parameter(symbol, function, symbol in needed, spell, plan, names)
        elif function is None:
            _aliases(symbol, family, symbol in needed, spell, plan, names)
    return needed


def _parameter(
    symbol: Symbol,
    function: cst.FunctionDef,
    needed: bool,
    spell: Callable[[Expression], str] | None,
    plan: Plan,
    names: Names,
) -> None:
    param = next(one for one in names.parameters(function) if one.name.value == symbol[1])
    calls = names.calls.get(function, [])
    others = [use for use in _references(function, names) if not _is_called(use, names)]
    starred = [call for call in calls if any(arg.star for arg in call.args)]
    if others or starred:
        words = (
            f"`{function.name.value}` is also passed on, or called with a star: its parameters are not known to be free"
        )
        plan.leave((others + starred)[0], words)
        return
    if not needed:
        plan.drop(param)
    else:
        assert spell is not None
        plan.write(param.name, spell(param.name))
    for call in calls:
        arg = names.bind(call, function).get(symbol[1])
        if arg is None:
            continue
        if not needed:
            plan.drop(arg)
            continue
        assert spell is not None
        if names.symbol(arg.value) is not None:
            plan.write(arg.value, spell(arg.value))
        if arg.keyword is not None:
            name = spell(param.name)
            plan.edits[arg.keyword] = lambda updated, name=name: expression(name)  # type: ignore[misc]


def _references(function: cst.FunctionDef, names: Names) -> list[cst.CSTNode]:
    owner = names.class_of(function)
    if owner is not None and function.name.value == "__init__":
        symbols = [symbol for symbol, one in names.classes.items() if one is owner]
    else:
        symbols = [symbol for symbol, one in names.functions.items() if one is function]
    return [use for symbol in symbols for use in names.uses[symbol]]


def _is_called(use: cst.CSTNode, names: Names) -> bool:
    up = names.parent(use)
    heads = isinstance(up, (cst.FunctionDef, cst.ClassDef)) and up.name is use
    return heads or (isinstance(up, cst.Call) and up.func is use)


def _aliases(
    symbol: Symbol,
    family: list[Symbol],
    needed: bool,
    spell: Callable[[Expression], str] | None,
    plan: Plan,
    names: Names,
) -> None:
    for node, value in names.values.get(symbol, []):
        source = names.symbol(value)
        if source is None or source not in family or not isinstance(node, cst.Assign):
            continue
        if not needed:
            plan.drop(node)
        elif spell is not None:
            plan.write(node.targets[0].target, spell(node.targets[0].target))
            plan.write(value, spell(value))
