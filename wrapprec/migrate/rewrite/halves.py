"""From a model made float16 by hand, with float32 copies for the optimizer: the copies go."""

from __future__ import annotations

from dataclasses import dataclass, field

from wrapprec.migrate.rewrite.edits import Plan, argument_of
from wrapprec.migrate.rewrite.found import optimizers
from wrapprec.migrate.rewrite.names import Expression, Names, Symbol
from wrapprec.migrate.rewrite.place import Place, find_place, home, spelled
from wrapprec.migrate.rewrite.plain import place_reason
from wrapprec.migrate.rewrite.syntax import cst, each, same, text


@dataclass
class _Copies:
    """The float32 copies of a model's parameters, and what is done with them."""

    symbol: Symbol
    model: Symbol
    made: cst.CSTNode
    scales: list[Expression] = field(default_factory=list)
    brings: bool = False
    takes: bool = False


def plan_halves(names: Names, package: str) -> list[Plan]:
    """Plan the edits of every model that has float32 copies of its parameters.

    Args:
        names: of the file.
        package: what wrapprec is called in it.
    """
    plans = []
    for symbol, values in list(names.values.items()):
        for made, value in values:
            model = _copied(value, names)
            if model is not None and _halvings(model, names):
                plan = Plan()
                _plan(_Copies(symbol, model, made), plan, names, package)
                plans.append(plan)
    return plans


def _copied(value: Expression, names: Names) -> Symbol | None:
    """The model whose parameters a comprehension copies to float32."""
    if not isinstance(value, cst.ListComp) or value.for_in.ifs or value.for_in.inner_for_in is not None:
        return None
    model = _parameters_of(value.for_in.iter, names)
    methods = {node.attr.value for node in each(value.elt) if isinstance(node, cst.Attribute)}
    copies = "float" in methods and methods <= {"float", "clone", "detach", "data", "requires_grad_", "cuda"}
    return model if copies else None


def _parameters_of(node: cst.CSTNode, names: Names) -> Symbol | None:
    if not isinstance(node, cst.Call) or node.args or not isinstance(node.func, cst.Attribute):
        return None
    symbol = names.symbol(node.func.value)
    roots = names.roots(symbol) if symbol is not None and node.func.attr.value == "parameters" else frozenset()
    return next(iter(roots)) if len(roots) == 1 else None


def _halvings(model: Symbol, names: Names) -> list[cst.Call]:
    """The calls of `half` that make the model float16."""
    found = []
    for node in names.nodes:
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute) and node.func.attr.value == "half":
            symbol = names.symbol(node.func.value)
            values = [value for one in names.family(model) for _, value in names.values.get(one, [])]
            chained = any(node is value for value in values)
            if chained or (symbol is not None and model in names.roots(symbol)):
                found.append(node)
    return found


def _plan(copies: _Copies, plan: Plan, names: Names, package: str) -> None:
    owner = [one for one in optimizers(names) if _is_of(one, copies, names)]
    if len(owner) != 1:
        plan.leave(copies.made, "not exactly one optimizer gets these float32 copies")
        return
    for use in names.uses[copies.symbol]:
        _read(use, copies, plan, names)
    if not plan.reasons and not (copies.brings and copies.takes):
        plan.leave(copies.made, "gradients and weights are not copied to and from these float32 copies in loops")
    if plan.reasons:
        return
    plan.drop(copies.made)
    for call in _halvings(copies.model, names):
        _unhalve(call, plan, names)
    place = find_place(names.function(copies.made), [copies.model, owner[0]], [copies.model], None, names)
    if not isinstance(place, Place):
        plan.reasons.append(place)
        return
    _scale(copies, plan, names)
    line = names.last(place.after) + 1
    called = [spelled(root, place.function, line, names) for root in (copies.model, owner[0])]
    scales = {text(one) for one in copies.scales}
    if None in called or len(scales) > 1 or not all(_is_known(one, place, names) for one in scales):
        plan.reasons.append(place_reason(place))
        return
    scale = f", loss_scale={scales.pop()}" if scales else ""
    plan.behind[place.after] = [f'{package}.wrap({called[0]}, {called[1]}, "16-module"{scale})']
    plan.note(copies.made, "the model's own parameters are float32 now, and the optimizer gets them")
    plan.wraps = True


def _is_known(scale: str, place: Place, names: Names) -> bool:
    """Whether a number, or a variable of its name, is there at a place."""
    made = [(symbol, node) for symbol in names.values for node, _ in names.values[symbol] if symbol[1] == scale]
    here = [names.line(node) <= names.line(place.after) for symbol, node in made if home(symbol) is place.function]
    return scale.replace(".", "").isdigit() or (bool(made) and all(here) and len({one for one, _ in made}) == 1)


def _is_of(optimizer: Symbol, copies: _Copies, names: Names) -> bool:
    values = [value for _, value in names.values[optimizer] if isinstance(value, cst.Call)]
    return any(names.symbol(arg.value) == copies.symbol for value in values for arg in value.args)


def _read(use: Expression, copies: _Copies, plan: Plan, names: Names) -> None:
    up = names.parent(use)
    if isinstance(up, cst.AssignTarget):
        return
    loop = next((one for one in names.above(use) if isinstance(one, cst.For)), None)
    if loop is not None and loop.iter is use and _all_match(loop, ("requires_grad",)):
        plan.drop(loop)
        return
    call = names.parent(up) if isinstance(up, cst.Arg) else None
    if isinstance(call, cst.Call) and text(call.func) == "zip" and loop is not None and loop.iter is call:
        models = [_parameters_of(arg.value, names) for arg in call.args]
        if copies.model in models and len(call.args) == 2:
            _loop(loop, call.args[0].value is use, copies, plan)
            return
    if (
        isinstance(call, cst.Call)
        and call.args[0] is up
        and any(names.line(node) == names.line(call) for one in optimizers(names) for node, _ in names.values[one])
    ):
        model = spelled(copies.model, names.function(use), names.line(use), names)
        if model is not None:
            plan.write(use, f"{model}.parameters()")
            return
    plan.leave(use, f"the float32 copies `{copies.symbol[1]}` are used in a way that is not known")


def _all_match(loop: cst.For, words: tuple[str, ...]) -> bool:
    lines = [line for line in loop.body.body if isinstance(line, cst.SimpleStatementLine)]
    return len(lines) == len(loop.body.body) and all(any(word in text(line) for word in words) for line in lines)


def _loop(loop: cst.For, copies_first: bool, copies: _Copies, plan: Plan) -> None:
    """A loop over both: it brings gradients to the copies, or takes weights from them."""
    target = loop.target
    pair = [one.value for one in target.elements] if isinstance(target, cst.Tuple) else []
    lines = loop.body.body
    if len(pair) != 2 or loop.orelse is not None:
        plan.leave(loop, "this loop over parameters and copies is of no known form")
        return
    copy, param = (text(one) for one in (pair if copies_first else pair[::-1]))
    said = [text(small) for line in lines if isinstance(line, cst.SimpleStatementLine) for small in line.body]
    if len(said) == len(lines) == 1 and said[0] in (
        f"{param}.data.copy_({copy}.data)",
        f"{param}.data = {copy}.data.half()",
        f"{param}.data.copy_({copy})",
    ):
        copies.takes = True
        plan.drop(loop)
        return
    first = said[0] if said else ""
    grads = [
        f"{param}.grad{data}{detach}.float()" for data in ("", ".data") for detach in ("", ".detach()", ".clone()")
    ]
    ok = len(said) == len(lines) and any(first.startswith(f"{copy}.grad = {grad}") for grad in grads)
    rest = [first.split(".float()", 1)[1]] if ok else []
    rest += [one.removeprefix(f"{copy}.grad").removeprefix(".data") for one in said[1:]]
    for one in filter(None, rest):
        scale = _divisor(one.strip())
        if scale is None:
            ok = False
        else:
            copies.scales.append(scale)
    if not ok or len(copies.scales) > 1:
        plan.leave(loop, "this loop over parameters and copies is of no known form")
        return
    copies.brings = True
    plan.drop(loop)


def _divisor(code: str) -> Expression | None:
    """The scale in `/ S`, `/= S` or `.div_(S)`."""
    for head, tail in (("/=", ""), ("/", ""), (".div_(", ")")):
        if code.startswith(head) and code.endswith(tail):
            inner = code[len(head) : len(code) - len(tail)].strip()
            return cst.parse_expression(inner) if inner.replace("_", "").replace(".", "").isalnum() else None
    return None


def _scale(copies: _Copies, plan: Plan, names: Names) -> None:
    """Take the scale out of the loss: `(loss * S).backward()`."""
    for node in names.nodes:
        if not isinstance(node, cst.Call) or not text(node.func).endswith(".backward"):
            continue
        assert isinstance(node.func, cst.Attribute)
        loss = node.func.value
        if not copies.scales:
            continue
        scale = copies.scales[0]
        if (
            isinstance(loss, cst.BinaryOperation)
            and isinstance(loss.operator, cst.Multiply)
            and same(loss.right, scale)
        ):
            left = cst.Call(cst.Name("_"), [cst.Arg(loss.left)])
            plan.edits[loss] = lambda updated, left=left: argument_of(left)  # type: ignore[misc]
        else:
            plan.leave(node, "the loss is not scaled here as the gradients are unscaled")


def _unhalve(call: cst.Call, plan: Plan, names: Names) -> None:
    up = names.parent(call)
    assert isinstance(call.func, cst.Attribute)
    again = isinstance(up, cst.Assign) and same(up.targets[0].target, call.func.value)  # model = model.half()
    if isinstance(up, cst.Expr) or again:
        plan.drop(up)  # type: ignore[arg-type]
    else:
        plan.edits[call] = lambda updated: updated.func.value  # type: ignore[attr-defined]
