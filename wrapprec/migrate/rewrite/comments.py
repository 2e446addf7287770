"""Comments within the parentheses of code that goes: they stay, as lines of their own above the statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wrapprec.migrate.rewrite.lists import GONE
from wrapprec.migrate.rewrite.syntax import cst, each

_FOR_CHECKERS = ("# noqa", "# type:", "#noqa", "# pylint:", "# fmt:")
_PARTS: dict[type[cst.CSTNode], tuple[str, ...]] = {
    cst.SimpleStatementLine: ("body",),
    cst.With: ("items", "lpar", "rpar"),
    cst.FunctionDef: ("decorators", "params"),
    cst.If: ("test",),
    cst.While: ("test",),
    cst.For: ("iter",),
}
"""What of a statement may go while comments in it speak of more; blocks inside are statements again."""


def comment_lines(trailing: cst.TrailingWhitespace) -> list[cst.EmptyLine]:
    """The comment at the end of a line as a line of its own; one for a checker goes with its line."""
    comment = trailing.comment
    if comment is None or comment.value.startswith(_FOR_CHECKERS):
        return []
    return [cst.EmptyLine(comment=comment, newline=trailing.newline)]


def keep_comments(original: Any, before: Any, became: Any) -> Any:
    """Put the comments that a statement lost above what it became.

    Args:
        original: the statement as it was.
        before: with its parts edited.
        became: what comes in its place: a statement, or several.
    """
    parts = _PARTS.get(type(original), ())
    had = [one for part in parts for one in _comments(getattr(original, part))]
    if not had:
        return became
    several = list(became.nodes) if isinstance(became, cst.FlattenSentinel) else [became]
    first = several[0] if several else None
    whole = first is not None and type(first) is type(original) and not _is_mark(first)
    has = [one for part in parts for one in _comments(getattr(first if whole else None, part, ()))]
    for one in has:
        if one in had:
            had.remove(one)
    lines = [cst.EmptyLine(comment=cst.Comment(one)) for one in had if not one.startswith(_FOR_CHECKERS)]
    if not lines:
        return became
    if first is None or not hasattr(first, "leading_lines"):
        mark = cst.SimpleStatementLine([cst.Expr(cst.Name(GONE))], leading_lines=lines)
        return cst.FlattenSentinel([mark, *several])
    above = len(before.leading_lines) if hasattr(before, "leading_lines") else 0
    old = list(first.leading_lines)
    several[0] = first.with_changes(leading_lines=[*old[:above], *lines, *old[above:]])
    return cst.FlattenSentinel(several) if len(several) > 1 else several[0]


def _is_mark(node: Any) -> bool:
    only = node.body[0] if isinstance(node, cst.SimpleStatementLine) and node.body else None
    return isinstance(only, cst.Expr) and isinstance(only.value, cst.Name) and only.value.value == GONE


def _comments(part: Any) -> list[str]:
    nodes: Sequence[Any] = part if isinstance(part, (list, tuple)) else [part]
    inside = [one for node in nodes if isinstance(node, cst.CSTNode) for one in each(node)]
    return [one.value for one in inside if isinstance(one, cst.Comment)]
