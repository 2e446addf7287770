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
    others = [(node, one) for node, one in names.values[symbol] if one is not value]
    if any(constant(one) != "None" for _, one in others) or symbol in names.moving:
        return Reason(call, f"`{symbol[1]}` is set to more than one scaler")
    enabled = argument(call, "enabled", 5 if _takes_device(call, names) else 4)
    if enabled is not None and constant(enabled) != "True":
        flags.append(Flag(enabled))
    statements = [up, *(node for node, _ in others)]
    return Scaler(symbol, call, statements, flags, optional=bool(others) or value is not call)


def _takes_device(call: cst.Call, names: Names) -> bool:
    return any(name.startswith("torch.amp.") for name in names.qualified(call.func))


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
    used = {names.parent(use) for one in names.family(symbol) for use in names.uses[one]}
    methods = {up.attr.value for up in used if isinstance(up, cst.Attribute)}
    return {"step", "zero_grad"} <= methods and not is_module(symbol, names)
