"""What makes an autocast each time that it is called: a `partial`, a `lambda`, a function or method of the file."""

from __future__ import annotations

from collections.abc import Sequence

from wrapprec.migrate.rewrite.facts import AUTOCAST, NOTHING, Flag, around, choose, is_partial
from wrapprec.migrate.rewrite.names import Expression, Names, Symbol
from wrapprec.migrate.rewrite.syntax import cst, text


def is_nothing(value: cst.CSTNode, names: Names, called: bool) -> bool:
    """Whether a value is a context that does nothing.

    Args:
        value: an expression.
        names: of the file.
        called: whether the value is called for each context: `nullcontext` itself then, not `nullcontext()`.
    """
    if called and isinstance(value, cst.Call) and is_partial(value, names) and len(value.args) == 1:
        value = value.args[0].value
    if called and isinstance(value, cst.Lambda) and not _takes(value.params):
        value, called = value.body, False
    if called:
        return isinstance(value, (cst.Name, cst.Attribute)) and bool(names.qualified(value) & NOTHING)
    return isinstance(value, cst.Call) and bool(names.qualified(value.func) & NOTHING) and not value.args


def through_lambda(value: cst.CSTNode, names: Names) -> tuple[cst.CSTNode, list[Flag]] | None:
    """The value that a `lambda` around a context is, and its flags; None without one."""
    up = names.parent(value)
    if not isinstance(up, cst.Lambda) or up.body is not value or _takes(up.params):
        return None
    outer, flags, _ = choose(up, names)
    return outer, flags


def _takes(params: cst.Parameters) -> bool:
    stars = (cst.Param, cst.ParamStar)
    given = [*params.posonly_params, *params.params, *params.kwonly_params]
    return bool(given) or isinstance(params.star_arg, stars) or params.star_kwarg is not None


def giver(up: cst.CSTNode | None, names: Names) -> tuple[cst.FunctionDef, list[Flag]] | None:
    """The function that does nothing but give a context, and the flags that it asks.

    Args:
        up: the `return` of the context.
        names: of the file.
    """
    function = names.function(up) if isinstance(up, cst.Return) else None
    if function is None or not isinstance(function.body, cst.IndentedBlock) or function.asynchronous is not None:
        return None
    if names.class_of(function) is None and _takes(function.params):
        return None
    if names.class_of(function) is not None and len(names.parameters(function)) != 1:
        return None
    if any(text(one.decorator) != "property" for one in function.decorators):
        return None
    flags: list[Flag] = []
    found = False
    for statement in function.body.body:
        if any(one is statement for one in names.above(up)):  # type: ignore[arg-type]
            if not _gives_only(statement, up, names):
                return None
            found = True
        elif _is_return_of_nothing(statement, names) and found:
            continue
        elif not found and isinstance(statement, cst.If) and _leaves(statement, names):
            flags.append(Flag(statement.test, negated=True))
        elif not _is_docstring(statement):
            return None
    return function, [*flags, *around(up, names, function)]  # type: ignore[arg-type]


def _gives_only(statement: cst.CSTNode, up: cst.CSTNode | None, names: Names) -> bool:
    """Whether a statement, and each side of it where it is an `if`, returns the context or nothing."""
    if isinstance(statement, cst.SimpleStatementLine):
        return statement.body[0] is up or _is_return_of_nothing(statement, names)
    if not isinstance(statement, cst.If):
        return False
    rest = statement.orelse
    sides = [statement.body] if rest is None else [statement.body, rest if isinstance(rest, cst.If) else rest.body]
    for side in sides:
        parts: Sequence[cst.CSTNode] = [side] if isinstance(side, cst.If) else side.body
        if len(parts) != 1 or not (parts[0] is up or _gives_only(parts[0], up, names)):
            return False
    return True


def _leaves(statement: cst.If, names: Names) -> bool:
    body = statement.body.body
    only = body[0] if len(body) == 1 and statement.orelse is None else None
    return only is not None and _is_return_of_nothing(only, names)


def _is_return_of_nothing(statement: cst.CSTNode, names: Names) -> bool:
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        statement = statement.body[0]
    if not isinstance(statement, cst.Return) or statement.value is None:
        return False
    return is_nothing(statement.value, names, called=False)


def _is_docstring(statement: cst.CSTNode) -> bool:
    only = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
    return isinstance(only, cst.Expr) and isinstance(only.value, cst.SimpleString)


def uses_of(function: cst.FunctionDef, names: Names) -> tuple[Symbol | None, list[Expression]]:
    """What a function is called, and where the file speaks of it."""
    symbol = next((one for one, other in names.functions.items() if other is function), None)
    found = [] if symbol is None else [use for use in names.uses[symbol] if use is not function.name]
    return symbol, found


def elsewhere(symbol: Symbol, names: Names) -> list[cst.Attribute]:
    """Where something of that name may be used from outside of its class; torch's own `autocast` is another thing."""
    return [one for one in names.elsewhere(symbol) if not names.qualified(one) & AUTOCAST]
