"""What a file says of mixed precision: every autocast, scaler and optimizer, and in which way each is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from wrapprec.migrate.rewrite.names import Expression, Function, Names, Symbol
from wrapprec.migrate.rewrite.syntax import COMPOUND, cst, each, text

AUTOCAST = {
    f"torch.{home}autocast" for home in ("", "amp.", "amp.autocast_mode.", "cuda.amp.", "cuda.amp.autocast_mode.")
} | {"torch.cpu.amp.autocast", "torch.cpu.amp.autocast_mode.autocast"}
SCALER = {
    f"torch.{home}GradScaler" for home in ("amp.", "amp.grad_scaler.", "cuda.amp.", "cuda.amp.grad_scaler.", "cpu.amp.")
}
NOTHING = {"contextlib.nullcontext", "contextlib.suppress", "contextlib.ExitStack"}
DTYPES = {"torch.float16": '"16-mixed"', "torch.half": '"16-mixed"', "torch.bfloat16": '"bf16-mixed"'}
DEVICES = {"cpu": '"bf16-mixed"', "hpu": '"bf16-mixed"', "xla": '"bf16-mixed"'}
"""Where autocast means bfloat16 by default (torch 2.13); float16 elsewhere."""

Choice: TypeAlias = "tuple[Literal['literal', 'dtype', 'device'], str | Expression]"
"""How a policy is chosen: a preset, an expression for a dtype, or one for a device whose default dtype it is."""


@dataclass(frozen=True)
class Flag:
    """A condition that precision depends on, with where it is written; negated or not."""

    test: Expression
    negated: bool = False


@dataclass(eq=False)
class Cast:
    """One construction of autocast.

    Args:
        call: the construction.
        choice: the policy it means.
        enabled: its flags, all of which must hold.
        regions: the `with` items and decorators that it governs.
        off: whether it is constantly disabled.
        contexts: the variables that hold it.
        called: whether these hold what makes it, and are called at each `with`.
    """

    call: cst.Call
    choice: Choice
    enabled: list[Flag]
    regions: list[cst.WithItem | cst.Decorator] = field(default_factory=list)
    off: bool = False
    contexts: list[Symbol] = field(default_factory=list)
    statements: list[cst.CSTNode] = field(default_factory=list)
    called: bool = False


@dataclass(eq=False)
class Scaler:
    """One GradScaler.

    Args:
        symbol: what holds it.
        call: its construction.
        statements: the assignments of the symbol, of None too.
        enabled: the flags, all of which must hold.
        optional: whether the symbol may hold None instead.
        fork: the `if` whose sides make the same scaler for different versions of torch, if there is one.
    """

    symbol: Symbol
    call: cst.Call
    statements: list[cst.CSTNode]
    enabled: list[Flag]
    optional: bool
    fork: cst.If | None = None


@dataclass(frozen=True)
class Reason:
    """Why something is left as it is: where, and in words."""

    node: cst.CSTNode
    words: str


def argument(call: cst.Call, name: str, position: int | None = None) -> Expression | None:
    """The value of an argument by keyword or position; None where it is not given."""
    plain = [arg for arg in call.args if arg.keyword is None and not arg.star]
    for arg in call.args:
        if arg.keyword is not None and arg.keyword.value == name:
            return arg.value
    return plain[position].value if position is not None and position < len(plain) else None


def constant(node: Expression | None) -> str | None:
    """The text of True, False, None or a string without its quotes; None for anything else."""
    if isinstance(node, cst.Name) and node.value in ("True", "False", "None"):
        return node.value
    return str(node.raw_value) if isinstance(node, cst.SimpleString) else None


def cast_of(call: cst.Call, names: Names) -> Cast | None:
    """Read a call that constructs autocast, or a `partial` of one; None where it is another call."""
    whole = call
    if is_partial(call, names) and call.args and not call.args[0].star:
        call = call.with_changes(func=call.args[0].value, args=call.args[1:])
    found = names.qualified(call.func) & AUTOCAST
    if not found:
        return None
    home = _home(call, found)
    old = home.startswith(("torch.cuda.", "torch.cpu."))
    enabled = argument(call, "enabled", 0 if old else 2)
    dtype = argument(call, "dtype", 1)
    device = argument(call, "device_type", None if old else 0)
    choice: Choice
    if dtype is not None and constant(dtype) != "None":
        preset = next((DTYPES[name] for name in names.qualified(dtype) & set(DTYPES)), None)
        choice = ("dtype", dtype) if preset is None else ("literal", preset)
    elif old or device is None or constant(device) is not None:
        kind = "cpu" if home.startswith("torch.cpu.") else "cuda" if old else constant(device) or "cuda"
        choice = ("literal", DEVICES.get(kind.split(":")[0], '"16-mixed"'))
    else:
        choice = ("device", device)
    flags = [Flag(enabled)] if enabled is not None and constant(enabled) != "True" else []
    return Cast(whole, choice, flags, off=constant(enabled) == "False", called=whole is not call)


def _home(call: cst.Call, found: set[str]) -> str:
    """Where autocast comes from: one imported by `try` and `except` from two places is told by its device."""
    first = argument(call, "device_type", 0)
    wants = isinstance(first, (cst.SimpleString, cst.FormattedString)) or argument(call, "device_type") is not None
    fits = [one for one in sorted(found) if one.startswith(("torch.cuda.", "torch.cpu.")) is not wants]
    return (fits or sorted(found))[0]


def is_partial(call: cst.CSTNode | None, names: Names) -> bool:
    """Whether a node is a call of `functools.partial`."""
    return isinstance(call, cst.Call) and "functools.partial" in names.qualified(call.func)


def choose(node: cst.CSTNode, names: Names) -> tuple[cst.CSTNode, list[Flag], str]:
    """Follow a value up through `value if flag else nothing`.

    Returns:
        The outermost such expression, the flags, and what stands on the other sides.
    """
    flags: list[Flag] = []
    other = ""
    parent = names.parent(node)
    while isinstance(parent, cst.IfExp) and node is not parent.test:
        beside = parent.orelse if node is parent.body else parent.body
        is_call = isinstance(beside, cst.Call) and not beside.args
        is_none = bool(names.qualified(beside.func if is_call else beside) & NOTHING)  # type: ignore[attr-defined]
        if not is_none and constant(beside) != "None":
            return node, flags, "something else"
        other = other or ("None" if constant(beside) == "None" else "nullcontext")
        flags.append(Flag(parent.test, negated=node is parent.orelse))
        node, parent = parent, names.parent(parent)
    return node, flags, other


def around(node: cst.CSTNode, names: Names, function: Function) -> list[Flag]:
    """The flags of the `if` statements around a statement, up to its function."""
    flags: list[Flag] = []
    below = node
    for up in names.above(node):
        if up is function:
            break
        if isinstance(up, cst.If):
            flags.append(Flag(up.test, negated=below is up.orelse))
        below = up
    return flags


def statement(node: cst.CSTNode, names: Names) -> cst.CSTNode:
    """The smallest statement that a node is in."""
    kinds = (cst.BaseSmallStatement, *COMPOUND)
    return next(up for up in [node, *names.above(node)] if isinstance(up, kinds))


def mentions(node: cst.CSTNode, names: Names, seen: frozenset[cst.CSTNode] = frozenset()) -> set[Symbol]:
    """The roots of all symbols in a piece of code, and in the functions of the file that it calls."""
    found: set[Symbol] = set()
    for one in each(node):
        symbol = names.symbol(one) if isinstance(one, (cst.Name, cst.Attribute)) else None
        if symbol is not None:
            found |= names.roots(symbol)
        called = names.called(one) if isinstance(one, cst.Call) else None
        if called is not None and called not in seen and called.name.value != "__init__":
            found |= mentions(called.body, names, seen | {called})
    return found


def is_module(symbol: Symbol, names: Names) -> bool:
    """Whether a symbol holds a module, by what is done with it."""
    modules = (".parameters", ".named_parameters", ".train", ".eval", ".configure_optimizers")
    for one in names.family(symbol):
        for use in names.uses[one]:
            up = names.parent(use)
            if isinstance(up, cst.Attribute) and up.value is use and text(up).endswith(modules):
                return True
        for _, value in names.values.get(one, []):
            called = names.qualified(value.func) if isinstance(value, cst.Call) else set()
            if any(_is_torch_module(name) for name in called):
                return True
            is_result = isinstance(value, cst.Call) and isinstance(value.func, cst.Call)  # Loss()(x) is no module
            if isinstance(value, cst.Call) and not is_result and made_of(value.func, names):
                return True
            if "copy.deepcopy" in called and value.args:  # type: ignore[attr-defined]  # called is empty otherwise
                copied = names.symbol(value.args[0].value)  # type: ignore[attr-defined]
                if copied is not None and copied != symbol and is_module(copied, names):
                    return True
    return False


_TENSORS = ("Parameter", "Buffer", "UninitializedParameter", "UninitializedBuffer")


def _is_torch_module(name: str) -> bool:
    last = name.rpartition(".")[2]
    is_class = last[:1].isupper() and "Loss" not in last and last not in _TENSORS
    return name.startswith("torch.nn.") and is_class and not name.startswith("torch.nn.utils.")


def made_of(value: cst.CSTNode, names: Names) -> set[cst.ClassDef]:
    """The module classes of this file that a value is made of, also through other classes of the file."""
    found: set[cst.ClassDef] = set()
    todo = [value]
    while todo:
        for one in each(todo.pop()):
            symbol = names.symbol(one) if isinstance(one, cst.Name) else None
            owner = names.classes.get(symbol) if symbol is not None else None
            if owner is not None and owner not in found and is_module_class(owner, names):
                found.add(owner)
                todo += [owner.body, *(base.value for base in owner.bases)]
    return found


def is_module_class(owner: cst.ClassDef, names: Names) -> bool:
    """Whether a class of the file is a module: by its bases, or by its forward."""
    bases = {name for base in owner.bases for name in names.qualified(base.value)}
    if "torch.autograd.Function" in bases:
        return False
    return any(name.startswith("torch.nn") for name in bases) or (owner, "forward") in names.functions
