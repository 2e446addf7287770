"""A plan of edits as data: what happens to which node of a file, and why something is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from wrapprec.migrate.rewrite.facts import Reason
from wrapprec.migrate.rewrite.names import Symbol
from wrapprec.migrate.rewrite.syntax import cst

Edit: TypeAlias = "Callable[[cst.CSTNode], cst.CSTNode | None]"
"""What becomes of a node, from the node as its own parts were edited; None: it goes."""


@dataclass(frozen=True)
class Fork:
    """An `if` whose test goes: both sides say the same then, or one of them holds.

    Args:
        otherwise: what to do where the sides differ: take `body`, take `else`, `keep` the test, write another test, or
            None: give up.
    """

    otherwise: str | None


@dataclass
class Plan:
    """The edits of one connected group of uses.

    Args:
        edits: by node.
        forks: the `if` statements that may go.
        behind: lines of code to put behind a statement.
        reasons: why the group is left; nothing of it is edited then.
        notes: what to know of an edit.
        kept: parts that stay, and why, beside others that are edited.
        serves: the roots of the models and optimizers that it is about.
        wraps: whether the edits bring a line with `wrap`.
    """

    edits: dict[cst.CSTNode, Edit] = field(default_factory=dict)
    forks: dict[cst.CSTNode, Fork] = field(default_factory=dict)
    behind: dict[cst.CSTNode, list[str]] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)
    notes: list[Reason] = field(default_factory=list)
    kept: list[Reason] = field(default_factory=list)
    serves: set[Symbol] = field(default_factory=set)
    wraps: bool = False

    def drop(self, node: cst.CSTNode) -> None:
        """A statement, a `with` item, a decorator, an argument or a parameter goes."""
        self.edits[node] = lambda updated: None

    def write(self, node: cst.CSTNode, code: str) -> None:
        """Another expression comes in the place of one."""
        self.edits[node] = lambda updated: expression(code, like=updated)

    def leave(self, node: cst.CSTNode, words: str) -> None:
        """The group stays as it is, for this reason."""
        self.reasons.append(Reason(node, words))

    def keep(self, node: cst.CSTNode, words: str) -> None:
        """One part stays as it is, for this reason."""
        self.kept.append(Reason(node, words))

    def note(self, node: cst.CSTNode, words: str) -> None:
        """There is something to know."""
        self.notes.append(Reason(node, words))


def expression(code: str, like: cst.CSTNode | None = None) -> cst.BaseExpression:
    """Parse an expression; it keeps the parentheses of what it replaces."""
    node = cst.parse_expression(code)
    outer = getattr(like, "lpar", ())
    return node.with_changes(lpar=outer, rpar=like.rpar) if outer and not node.lpar else node  # type: ignore[union-attr]


def argument_of(call: cst.CSTNode) -> cst.BaseExpression:
    """The first argument of a call, in parentheses where an attribute of it would read otherwise."""
    assert isinstance(call, cst.Call)
    value = call.args[0].value
    atoms = (cst.Name, cst.Attribute, cst.Call, cst.Subscript, cst.List, cst.Tuple, cst.GeneratorExp)
    if isinstance(value, atoms) or value.lpar:
        return value
    return value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def optimizer_step(call: cst.CSTNode) -> cst.BaseExpression:
    """`scaler.step(optimizer, closure)` as `optimizer.step(closure)`."""
    assert isinstance(call, cst.Call)
    rest = call.args[1:]
    if rest:
        return call.with_changes(func=cst.Attribute(argument_of(call), cst.Name("step")), args=rest)
    func = cst.Attribute(argument_of(call), cst.Name("step"))
    return call.with_changes(func=func, args=(), whitespace_before_args=cst.SimpleWhitespace(""))


def wrap_call(package: str, parts: Sequence[str], target: str = "") -> str:
    """A line with `wrap`, in several lines where it would be long.

    Args:
        package: what wrapprec is called.
        parts: the arguments.
        target: what it is assigned to, if to anything.

    >>> print(wrap_call("wrapprec", ["model", "optimizer", "policy=" + 80 * "x"], "handle"), end="")
    handle = wrapprec.wrap(
        model,
        optimizer,
        policy=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx,
    )
    """
    head = f"{target} = {package}.wrap(" if target else f"{package}.wrap("
    short = f"{head}{', '.join(parts)})"
    return short if len(short) <= 100 else head + "".join(f"\n    {part}," for part in parts) + "\n)"
