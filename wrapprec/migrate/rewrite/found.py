"""The scalers and optimizers of a file, wherever they are made."""

from __future__ import annotations

from wrapprec.migrate.rewrite.facts import (
    SCALER,
    Flag,
    Reason,
    Scaler,
    argument,
    choose,
    constant,
    is_module,
)
from wrapprec.migrate.rewrite.names import Expression, Names, Symbol
from wrapprec.migrate.rewrite.syntax import cst, text

NUMBERS = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")
_SHARED = "`{}` is made in the body of the class, and all its objects share it: make it where the optimizer is made"
_NOT_OPTIMIZERS = ("torch.optim.lr_scheduler.", "torch.optim.swa_utils.")


def read_scalers(names: Names) -> tuple[list[Scaler], list[Reason]]:
    """Find every GradScaler of a file; the reasons are of those that are not held by one variable."""
    found: list[Scaler] = []
    reasons: list[Reason] = []
    for node in names.nodes:
        if isinstance(node, cst.Call) and any("ShardedGradScaler" in name for name in names.qualified(node.func)):
            reasons.append(Reason(node, "FSDP's own scaler: see docs/migrating.md"))
        if isinstance(node, (cst.Name, cst.Attribute)) and names.qualified(node) & SCALER:
            up = names.parent(node)
            if (
                isinstance(up, cst.Attribute)
                or names.aliases(up, node)
                or any(isinstance(one, (cst.Import, cst.ImportFrom, cst.Annotation)) for one in names.above(node))
            ):
                continue
            if not (isinstance(up, cst.Call) and up.func is node):
                reasons.append(Reason(node, f"`{text(node)}` is passed on, or a class above another"))
                continue
            if any(names.parent(up) in other.statements for other in found):
                continue  # the other side of an `if`
            one = _scaler(up, names)
            (found if isinstance(one, Scaler) else reasons).append(one)  # type: ignore[arg-type]
    return found, reasons


def _scaler(call: cst.Call, names: Names) -> Scaler | Reason:
    value, flags, _ = choose(call, names)
    up = names.parent(value)
    target = up.targets[0].target if isinstance(up, cst.Assign) and len(up.targets) == 1 else None
    target = up.target if isinstance(up, cst.AnnAssign) else target
    symbol = names.symbol(target)
    if symbol is None or up is None:
        return Reason(call, "the scaler is not held by one variable")
    if names.in_class(symbol):
        return Reason(call, _SHARED.format(text(call.func)))
    fork, twins = _twins(call, up, symbol, names) if value is call else (None, [])
    others = [(node, one) for node, one in names.values[symbol] if one is not value and node not in twins]
    if any(constant(one) != "None" for _, one in others) or symbol in names.moving:
        return Reason(call, f"`{symbol[1]}` is set to more than one scaler")
    enabled = argument(call, "enabled", 5 if _takes_device(call, names) else 4)
    if enabled is not None and constant(enabled) != "True":
        flags.append(Flag(enabled))
    statements = [up, *twins, *(node for node, _ in others)]
    return Scaler(symbol, call, statements, flags, bool(others) or value is not call, fork)


def _twins(call: cst.Call, up: cst.CSTNode, symbol: Symbol, names: Names) -> tuple[cst.If | None, list[cst.CSTNode]]:
    """The other side of an `if` that makes the same scaler by another name of torch's, if there is one."""
    others = [(node, value) for node, value in names.values[symbol] if node is not up]
    calls = [(node, value) for node, value in others if isinstance(value, cst.Call) and value is not call]
    if len(calls) != 1 or not names.qualified(calls[0][1].func) & SCALER:
        return None, []
    node, other = calls[0]
    fork = names.parent(names.parent(names.parent(up)))  # type: ignore[arg-type]  # assignment, line, block, if
    if not isinstance(fork, cst.If) or not isinstance(fork.orelse, cst.Else):
        return None, []
    one_side, other_side = _lines(fork.body), _lines(fork.orelse.body)
    sides = {id(one) for one in (*one_side, *other_side)}
    if len(one_side) != 1 or len(other_side) != 1 or sides != {id(up), id(node)}:
        return None, []
    return (fork, [node]) if _says(call, names) == _says(other, names) else (None, [])


def _lines(body: cst.BaseSuite) -> list[cst.CSTNode]:
    return [part for line in body.body for part in getattr(line, "body", [line])]


def _says(call: cst.Call, names: Names) -> list[str | None]:
    """What a construction says beside the device."""
    first = 1 if _takes_device(call, names) else 0
    values = [argument(call, name, first + number) for number, name in enumerate((*NUMBERS, "enabled"))]
    return [None if value is None else text(value) for value in values]


def _takes_device(call: cst.Call, names: Names) -> bool:
    found = names.qualified(call.func)
    if any(not name.startswith("torch.amp.") for name in found):  # imported by `try` and `except` from two places
        first = argument(call, "device", 0)
        return isinstance(first, cst.SimpleString) or argument(call, "device") is not None
    return bool(found)


def numbers(scaler: Scaler, names: Names) -> list[tuple[str, Expression]]:
    """The keywords of a scaler that say how the scale moves."""
    first = 1 if _takes_device(scaler.call, names) else 0
    given = [(name, argument(scaler.call, name, first + number)) for number, name in enumerate(NUMBERS)]
    return [(name, value) for name, value in given if value is not None]


def optimizers(names: Names) -> list[Symbol]:
    """The roots of all optimizers that a file makes, in the order of the text."""
    found: list[tuple[int, Symbol]] = []
    for symbol, values in names.values.items():
        calls = [(node, value) for node, value in values if isinstance(value, cst.Call)]
        if calls and names.roots(symbol) == {symbol} and any(_makes_optimizer(one, symbol, names) for _, one in calls):
            found.append((names.line(calls[0][0]), symbol))
    return [symbol for _, symbol in sorted(found, key=lambda entry: entry[0])]


def is_optimizer(call: cst.Call, names: Names) -> bool:
    """Whether a call makes one of torch's optimizers."""
    found = names.qualified(call.func)
    return any(name.startswith("torch.optim.") and not name.startswith(_NOT_OPTIMIZERS) for name in found)


def _makes_optimizer(value: Expression, symbol: Symbol, names: Names) -> bool:
    assert isinstance(value, cst.Call)
    if is_optimizer(value, names):
        return True
    if text(value.func).endswith(".configure_optimizers"):  # nanoGPT's and minGPT's models make their own
        return True
    used = {names.parent(use) for one in names.family(symbol) for use in names.uses[one]}
    methods = {up.attr.value for up in used if isinstance(up, cst.Attribute)}
    return {"step", "zero_grad"} <= methods and not is_module(symbol, names)
