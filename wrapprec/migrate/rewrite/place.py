"""Where the line with `wrap` goes: behind everything that it needs, where it runs once for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wrapprec.migrate.rewrite.facts import Flag, Reason, is_module, statement
from wrapprec.migrate.rewrite.names import Expression, Function, Names, Symbol
from wrapprec.migrate.rewrite.order import out_of_order, runs_often
from wrapprec.migrate.rewrite.syntax import cst, each, text


@dataclass(frozen=True)
class Place:
    """A place behind a statement of a block.

    Args:
        function: the function that it is in.
        block: the block.
        after: the statement of the block that comes before it.
    """

    function: Function
    block: cst.CSTNode
    after: cst.CSTNode


def chain(node: cst.CSTNode, names: Names) -> list[tuple[cst.CSTNode, cst.CSTNode]]:
    """The blocks around a node up to its function, innermost first, each with the statement that leads to the node."""
    found: list[tuple[cst.CSTNode, cst.CSTNode]] = []
    below = node
    for up in names.above(node):
        if isinstance(up, (cst.IndentedBlock, cst.Module)):
            found.append((up, below))
        if isinstance(up, cst.FunctionDef):
            break
        below = up
    return found


def models_of(optimizer: Symbol, names: Names) -> tuple[list[Symbol], list[Reason]]:
    """The models whose parameters an optimizer gets, as roots, in the order of the text.

    Args:
        optimizer: its root.
        names: of the file.
    """
    found: list[Symbol] = []
    values = [value for _, value in names.values.get(optimizer, []) if isinstance(value, cst.Call)]
    for value in values:
        first = [arg.value for arg in value.args[:1]] or [value]
        own = [value.func] if isinstance(value.func, cst.Attribute) else []
        here = _models_in([*own, *first, *_added(optimizer, names)], names, 3) or _models_in([value], names, 3)
        found += [one for one in here if one not in found]
    node = values[0] if values else names.uses[optimizer][0]
    kept = [one for one in found if not _is_self(one, names)]
    if len(kept) < len(found):
        return [], [Reason(node, "a module makes its own optimizer here: wrap it where it is made")]
    if not found:
        return [], [Reason(node, f"the model of the optimizer `{optimizer[1]}` is not known in this file")]
    return found, []


def _added(optimizer: Symbol, names: Names) -> list[cst.CSTNode]:
    """What an optimizer gets later, by `add_param_group`."""
    ups = [names.parent(use) for one in names.family(optimizer) for use in names.uses[one]]
    found = [names.parent(up) for up in ups if isinstance(up, cst.Attribute) and up.attr.value == "add_param_group"]
    return [call for call in found if call is not None]


def _is_self(symbol: Symbol, names: Names) -> bool:
    function = names.params.get(symbol)
    if function is None or names.class_of(function) is None:
        return False
    return names.parameters(function)[0].name.value == symbol[1]


def _models_in(parts: Sequence[cst.CSTNode], names: Names, depth: int) -> list[Symbol]:
    found: list[Symbol] = []
    for node in [one for part in parts for one in each(part)]:
        here: list[Symbol] = []
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
            method = node.func.attr.value
            base = names.base(node.func.value)
            if base is not None and any(word in method for word in ("param", "optim", "modules")):
                here = sorted(names.roots(base), key=lambda symbol: symbol[1])
        elif isinstance(node, (cst.Name, cst.Attribute)):
            symbol = names.symbol(node)
            if symbol is not None and is_module(symbol, names):
                here = sorted(names.roots(symbol), key=lambda symbol: symbol[1])
            elif symbol is not None and depth and symbol not in names.params:
                here = _models_in(_given(symbol, names), names, depth - 1)
        found += [one for one in here if one not in found and (is_module(one, names) or _is_self(one, names))]
    return found


def _given(symbol: Symbol, names: Names) -> list[cst.CSTNode]:
    """What a variable gets: its values, and what is appended to it in loops."""
    parts: list[cst.CSTNode] = [value for _, value in names.values.get(symbol, [])]
    for use in names.uses[symbol]:
        up = names.parent(use)
        if isinstance(up, cst.Attribute) and up.attr.value in ("append", "extend"):
            parts += [one.iter for one in names.above(use) if isinstance(one, cst.For)][:1]
            parts += [one for one in [names.parent(up)] if isinstance(one, cst.Call)]
    return [part for part in parts if len(list(each(part))) < 300]


def home(symbol: Symbol) -> object:
    """Where a symbol lives: a function, a class, or None for the file itself."""
    owner = symbol[0]
    return owner if isinstance(owner, cst.ClassDef) else getattr(owner, "node", None) if _is_local(owner) else None


def _is_local(scope: object) -> bool:
    return type(scope).__name__ in ("FunctionScope", "ClassScope", "ComprehensionScope")


def spelled(root: Symbol, function: Function, before: int, names: Names) -> str | None:
    """How something is called in a function, before a line; None where it is not there (yet)."""
    found: list[tuple[int, str]] = []
    for symbol in names.family(root):
        where = home(symbol)
        lines = [names.line(node) for node, _ in names.values.get(symbol, []) if names.function(node) is function]
        set_before = any(line < before for line in lines)
        if isinstance(where, cst.ClassDef):
            if function is None or not names.lineage.related(names.class_of(function), where):
                continue
            set_before = set_before or set_above(symbol, function, before, names)
            if set_before or (function.name.value != "__init__" and not lines):
                self_name = names.parameters(function)[0].name.value
                found.append((0, f"{self_name}.{symbol[1]}"))
        elif where is function and (set_before or symbol in names.params):
            found.append((1, symbol[1]))
        elif where is None and function is not None:
            found.append((2, symbol[1]))
    wanted = [entry for entry in found if entry[1].split(".")[-1] == root[1]] or found
    return min(wanted)[1] if wanted else None


def set_above(symbol: Symbol, function: Function, before: int, names: Names) -> bool:
    """Whether `super().__init__()`, called in a function before a line, has set an attribute of `self`."""
    made = [names.function(node) for node, _ in names.values.get(symbol, [])]
    for one in made:
        calls = names.calls.get(one, []) if one is not None and one.name.value == "__init__" else []
        if any(names.function(call) is function and names.line(call) < before for call in calls):
            return names.class_of(one) is not names.class_of(function)
    return False


def find_place(
    function: Function,
    needed: Sequence[Symbol],
    models: Sequence[Symbol],
    anchor: cst.CSTNode | None,
    names: Names,
) -> Place | Reason:
    """Find the place in a function.

    Args:
        function: where.
        needed: the roots of models and optimizers.
        models: the roots of the models alone.
        anchor: a statement of the function that the place should not be before, if there is one.
        names: of the file.
    """
    statements = [] if anchor is None else [anchor]
    latest = [one for one in needed if one not in models] or models
    lines = [line for root in latest for line in _defined(root, function, names)]
    last = max(lines, default=0) if anchor is None else names.line(anchor)
    for root in needed:
        for symbol in names.family(root):
            made = [node for node, _ in names.values.get(symbol, []) if names.function(node) is function]
            statements += [node for node in made if names.line(node) <= last]
    if not statements:
        where = names.module if function is None else function
        return Reason(where, "model and optimizer are made in another place")
    chains = [chain(statement(node, names), names) for node in statements]
    shared = [block for block, _ in chains[0] if all(any(block is other for other, _ in one) for one in chains)]
    block = shared[0]
    for node in statements:
        for up in names.above(node):
            if up is block:
                break
            if isinstance(up, (cst.For, cst.While)):
                return Reason(node, "this is made in a loop, and what belongs to it outside of it")
    after = max((below for one in chains for up, below in one if up is block), key=names.line)
    place = Place(function, block, after)
    trouble = out_of_order(function, after, [one for one in needed if one not in models], names)
    trouble = trouble or runs_often(function, after, models, names)
    return place if trouble is None else trouble


def _defined(root: Symbol, function: Function, names: Names) -> list[int]:
    made = [names.line(node) for node, _ in names.values.get(root, []) if names.function(node) is function]
    return made


def translate(flag: Flag, place: Place, names: Names) -> str | None:
    """Write a flag's condition for another place; None where something of it is not known there."""
    inner = _carry(flag.test, place, names, 4)
    return None if inner is None else negated(inner) if flag.negated else inner


def carry(node: Expression, place: Place, names: Names) -> str | None:
    """Write an expression for another place; None where something of it is not known there."""
    return _carry(node, place, names, 4)


def _carry(node: Expression, place: Place, names: Names, depth: int) -> str | None:
    edits: dict[cst.CSTNode, str] = {}
    todo: list[cst.CSTNode] = [node]
    while todo:
        one = todo.pop()
        if isinstance(one, (cst.Lambda, cst.GeneratorExp, cst.ListComp, cst.Await, cst.Yield, cst.NamedExpr)):
            return None
        symbol = names.symbol(one) if isinstance(one, (cst.Name, cst.Attribute)) else None
        if symbol is None:
            if isinstance(one, cst.Attribute):
                todo.append(one.value)  # the attribute's own name stands for nothing by itself
            elif isinstance(one, cst.Arg):
                todo.append(one.value)
            else:
                todo += one.children
            continue
        written = _written(symbol, one, place, names, depth)
        if written is None:
            return None
        edits[one] = written
    return text(node) if not edits else _replaced(node, edits)


def _written(symbol: Symbol, node: cst.CSTNode, place: Place, names: Names, depth: int) -> str | None:
    """How to write a symbol at a place."""
    if symbol in names.moving:
        return None
    where, line = home(symbol), names.line(place.after)
    made = [one for one, _ in names.values.get(symbol, [])]
    if isinstance(where, cst.ClassDef):
        inside = place.function is not None and names.lineage.related(names.class_of(place.function), where)
        here = [one for one in made if names.function(one) is place.function]
        if inside and not here and set_above(symbol, place.function, line + 1, names):
            return f"{names.parameters(place.function)[0].name.value}.{symbol[1]}"  # type: ignore[arg-type]
        plain = names.symbol(names.values[symbol][0][1]) if len(made) == 1 else None
        if inside and here and plain in names.params and home(plain) is place.function:
            return plain[1]  # self.amp = amp: the same flag, however it is asked for
        if inside and here and all(names.line(one) <= line for one in here) and len(here) == len(made):
            return f"{names.parameters(place.function)[0].name.value}.{symbol[1]}"  # type: ignore[arg-type]
        if inside and not made:  # an attribute of the class, or of a class above
            return text(node)
    elif where is place.function or where is None:
        same_level = where is place.function
        if not same_level or all(names.line(one) <= line for one in made):
            return symbol[1]
    if symbol in names.params and not made and depth:
        sites = names.sites.get(symbol, [])
        values = {None if _calls(site) else _carry(site, place, names, depth - 1) for site in sites}
        one = values.pop() if len(values) == 1 else None
        return one if one is None or one.replace(".", "").replace("_", "").isalnum() else f"({one})"
    if len(made) == 1 and depth:  # an alias: self.use_amp = args.amp
        value = names.values[symbol][0][1]
        return None if _calls(value) else _carry(value, place, names, depth - 1)
    (root, *more) = names.roots(symbol)
    return None if more else spelled(root, place.function, line, names)


def _calls(node: cst.CSTNode) -> bool:
    """Whether an expression does something: it is not to be done twice."""
    return any(isinstance(one, cst.Call) for one in each(node))


def _replaced(node: Expression, edits: dict[cst.CSTNode, str]) -> str:
    class Replace(cst.CSTTransformer):
        def on_leave(self, original: cst.CSTNode, updated: cst.CSTNode) -> cst.CSTNode:  # type: ignore[override]
            written = edits.get(original)
            return updated if written is None else cst.parse_expression(written)

    changed = node.visit(Replace())
    assert isinstance(changed, cst.BaseExpression)
    return text(changed)


_OPPOSITE = {cst.Equal: cst.NotEqual, cst.NotEqual: cst.Equal, cst.Is: cst.IsNot, cst.IsNot: cst.Is}


def negated(condition: str) -> str:
    """Write the opposite of a condition."""
    node = cst.parse_expression(condition)
    if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Not):
        return text(node.expression.with_changes(lpar=[], rpar=[]))
    if isinstance(node, cst.Comparison) and len(node.comparisons) == 1:
        target = node.comparisons[0]
        opposite = _OPPOSITE.get(type(target.operator))
        if opposite is not None:
            return text(node.with_changes(comparisons=[target.with_changes(operator=opposite())]))
    plain = isinstance(node, (cst.Name, cst.Attribute, cst.Call))
    return f"not {condition}" if plain or condition.startswith("(") else f"not ({condition})"
