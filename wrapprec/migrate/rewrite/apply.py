"""Carries plans out: the one transformer, which leaves every byte alone that no edit names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wrapprec.migrate.rewrite.comments import comment_lines, keep_comments
from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.facts import Reason
from wrapprec.migrate.rewrite.lists import GONE, commas, parameters
from wrapprec.migrate.rewrite.syntax import COMPOUND, cst, each, same


def apply(module: cst.Module, plans: Sequence[Plan]) -> tuple[cst.Module, list[tuple[Plan, Reason]]]:
    """Carry plans out.

    Args:
        module: the tree that the plans speak of.
        plans: those without reasons against.

    Returns:
        The new tree, and the plans that turn out not to be possible, with the reason; the tree is of no use then.
    """
    transformer = _Transformer(plans)
    changed = module.visit(transformer)
    assert isinstance(changed, cst.Module)
    return changed, transformer.failures


class _Transformer(cst.CSTTransformer):
    def __init__(self, plans: Sequence[Plan]) -> None:
        super().__init__()
        self._edits = {node: (edit, plan) for plan in plans for node, edit in plan.edits.items()}
        self._forks = {node: (fork, plan) for plan in plans for node, fork in plan.forks.items()}
        self._behind: dict[cst.CSTNode, list[str]] = {}
        for plan in plans:
            for node, lines in plan.behind.items():
                self._behind.setdefault(node, []).extend(lines)
        self.failures: list[tuple[Plan, Reason]] = []
        self._elifs: set[cst.CSTNode] = set()

    def visit_If(self, node: cst.If) -> None:
        """Remember which `if` is an `elif`: only an `else` can come in its place."""
        if isinstance(node.orelse, cst.If):
            self._elifs.add(node.orelse)

    def on_leave(self, original: Any, updated: Any) -> Any:
        """Edit a node after its parts were edited."""
        edited = updated = super().on_leave(original, updated)
        if original in self._edits:
            changed = self._edits[original][0](updated)
            if changed is None and isinstance(original, cst.WithItem):  # libcst allows no `with` without items
                changed = updated.with_changes(item=cst.Name(GONE))
            if changed is None and isinstance(original, cst.Param):  # nor a star or slash without parameters
                changed = updated.with_changes(name=cst.Name(GONE))
            if changed is None and isinstance(original, COMPOUND):
                changed = _gone(updated.leading_lines, [])
            updated = cst.RemoveFromParent() if changed is None else changed
        elif isinstance(original, (cst.SimpleStatementLine, cst.SimpleStatementSuite)):
            updated = _line(original, updated)
        elif isinstance(original, cst.With):
            updated = _with(original, updated)
        elif isinstance(original, cst.Call):
            updated = commas(original, updated, "args")
        elif isinstance(original, cst.Parameters):
            updated = parameters(original, updated)
        elif isinstance(original, cst.If):
            became = self._if(original, updated)
            updated = _as_else(became, updated) if original in self._elifs else became
        elif isinstance(original, cst.Try):
            updated = _try(original, updated)
        if isinstance(original, (cst.IndentedBlock, cst.Module)):
            updated = _sweep(updated)
        if isinstance(original, cst.BaseStatement) and original not in self._elifs:
            updated = keep_comments(original, edited, updated)
        if original in self._behind:
            more = [cst.parse_statement(line + "\n") for line in self._behind[original]]
            first = [*updated.nodes] if isinstance(updated, cst.FlattenSentinel) else [updated]
            updated = cst.FlattenSentinel([*first, *more])
        return updated

    def _if(self, original: cst.If, updated: cst.If) -> Any:
        if original in self._forks:
            return self._fork(original, updated)
        rest = updated.orelse
        calls = any(isinstance(node, (cst.Call, cst.NamedExpr)) for node in each(updated.test))
        became = isinstance(rest, cst.Else) and same(updated.body, rest.body) and not same(original.body, rest.body)
        if became and not calls:  # both sides say the same now
            return _flat(updated.leading_lines, updated.body)
        if isinstance(rest, cst.Else) and _is_empty(rest.body) and not _is_empty(original.orelse.body):  # type: ignore[union-attr]
            updated = updated.with_changes(orelse=None)
            rest = None
        lost = _is_empty(updated.body) and not _is_empty(original.body) and rest is None
        if lost and not calls:
            return _gone(updated.leading_lines, _lines_of(updated.body))
        return updated

    def _fork(self, original: cst.If, updated: cst.If) -> Any:
        fork, plan = self._forks[original]
        rest = updated.orelse
        is_elif = isinstance(rest, cst.If)
        otherwise = fork.otherwise
        if isinstance(rest, cst.Else) and same(updated.body, rest.body):
            return _flat(updated.leading_lines, updated.body)
        if otherwise == "body" and not is_elif:
            return _flat(updated.leading_lines, updated.body)
        if otherwise == "else" and not is_elif:
            nothing = _gone(updated.leading_lines, [])
            return nothing if rest is None else _flat(updated.leading_lines, rest.body)
        if otherwise == "keep":
            return updated
        if _is_empty(updated.body) and rest is None:
            return _gone(updated.leading_lines, _lines_of(updated.body))
        if otherwise is None or otherwise in ("body", "else"):
            words = "the sides of this `if` differ, and what decides between them has no counterpart"
            self.failures.append((plan, Reason(original, words)))
            return updated
        return updated.with_changes(test=cst.parse_expression(otherwise))


def _as_else(became: Any, updated: cst.If) -> Any:
    """What an `elif` became, in its place."""
    if isinstance(became, cst.FlattenSentinel):
        body = cst.IndentedBlock(list(became.nodes)[1:])  # the first one holds the lines above the `elif`
        return cst.Else(_sweep(body), leading_lines=updated.leading_lines)
    if isinstance(became, cst.SimpleStatementLine):
        if _is_gone(became):
            comments = any(line.comment is not None for line in became.leading_lines)
            return updated if comments else cst.RemoveFromParent()
        body = cst.IndentedBlock([became.with_changes(leading_lines=[])])
        return cst.Else(body, leading_lines=updated.leading_lines)
    return became


def _try(original: cst.Try, updated: cst.Try) -> Any:
    """A `try` around nothing goes with its handlers, unless these set names."""
    more = updated.orelse is not None or updated.finalbody is not None
    sets = (cst.Import, cst.ImportFrom, cst.Assign, cst.FunctionDef, cst.ClassDef)
    handlers = [node for handler in updated.handlers for node in each(handler)]
    if (
        more
        or not _is_empty(updated.body)
        or _is_empty(original.body)
        or any(isinstance(one, sets) for one in handlers)
    ):
        return updated
    return _gone(updated.leading_lines, _lines_of(updated.body))


def _is_gone(node: cst.CSTNode) -> bool:
    if not isinstance(node, cst.SimpleStatementLine) or len(node.body) != 1:
        return False
    only = node.body[0]
    return isinstance(only, cst.Expr) and isinstance(only.value, cst.Name) and only.value.value == GONE


def _gone(lines: Sequence[cst.EmptyLine], more: Sequence[cst.EmptyLine]) -> cst.SimpleStatementLine:
    return cst.SimpleStatementLine([cst.Expr(cst.Name(GONE))], leading_lines=[*lines, *more])


def _line(original: Any, updated: Any) -> Any:
    """A line of statements, of which some may have gone."""
    if len(updated.body) == len(original.body):
        return updated
    if not updated.body:
        if isinstance(updated, cst.SimpleStatementSuite):
            return updated.with_changes(body=[cst.Expr(cst.Name(GONE))])
        return _gone(updated.leading_lines, comment_lines(updated.trailing_whitespace))
    last = updated.body[-1].with_changes(semicolon=original.body[-1].semicolon)
    return updated.with_changes(body=[*updated.body[:-1], last])


def _with(original: cst.With, updated: cst.With) -> Any:
    kept = [one for one in updated.items if not (isinstance(one.item, cst.Name) and one.item.value == GONE)]
    if len(kept) == len(original.items):
        return updated
    if not kept:
        return _flat(updated.leading_lines, updated.body)
    last = kept[-1].with_changes(comma=original.items[-1].comma)
    if isinstance(updated.lpar, cst.LeftParen) and len(kept) == 1:
        bare = {"lpar": cst.MaybeSentinel.DEFAULT, "rpar": cst.MaybeSentinel.DEFAULT}
        last = last.with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated.with_changes(items=[last], whitespace_after_with=cst.SimpleWhitespace(" "), **bare)
    return updated.with_changes(items=[*kept[:-1], last])


def _flat(lines: Sequence[cst.EmptyLine], body: cst.BaseSuite) -> Any:
    """The statements of a block in the place of the statement that held it."""
    if isinstance(body, cst.SimpleStatementSuite):
        if _is_empty(body):
            return _gone(lines, comment_lines(body.trailing_whitespace))
        return cst.SimpleStatementLine(body.body, leading_lines=lines, trailing_whitespace=body.trailing_whitespace)
    assert isinstance(body, cst.IndentedBlock)
    before = _gone(lines, comment_lines(body.header))
    return cst.FlattenSentinel([before, *body.body, _gone([], [line for line in body.footer if line.comment])])


def _is_empty(body: cst.BaseSuite) -> bool:
    if isinstance(body, cst.SimpleStatementSuite):
        return all(isinstance(one, cst.Expr) and getattr(one.value, "value", None) == GONE for one in body.body)
    return all(_is_gone(one) for one in body.body)


def _lines_of(body: cst.BaseSuite) -> list[cst.EmptyLine]:
    """The comments that are left of a block."""
    if not isinstance(body, cst.IndentedBlock):
        return []
    lines = [line for one in body.body for line in getattr(one, "leading_lines", ())]
    return [*comment_lines(body.header), *(line for line in [*lines, *body.footer] if line.comment is not None)]


def _sweep(block: Any) -> Any:
    """Move the comments of statements that have gone to the next one, or to the end of the block."""
    if not any(_is_gone(one) for one in block.body):
        return block
    kept: list[Any] = []
    waiting: list[cst.EmptyLine] = []
    for one in block.body:
        if _is_gone(one):
            waiting = _joined(waiting, one.leading_lines)
            continue
        if waiting and hasattr(one, "leading_lines"):
            one = one.with_changes(leading_lines=_joined(waiting, one.leading_lines))
            waiting = []
        kept.append(one)
    comments = [line for line in waiting if line.comment is not None]
    if isinstance(block, cst.Module):
        if not kept or not comments:
            return block.with_changes(body=kept)
        return block.with_changes(body=kept, footer=[*_stripped(waiting), *block.footer])
    if not kept:
        return block.with_changes(body=[_gone(comments, [])])
    return block.with_changes(body=kept, footer=[*(_stripped(waiting) if comments else []), *block.footer])


def _stripped(lines: list[cst.EmptyLine]) -> list[cst.EmptyLine]:
    while lines and lines[-1].comment is None:
        lines = lines[:-1]
    return lines


def _joined(one: Sequence[cst.EmptyLine], other: Sequence[cst.EmptyLine]) -> list[cst.EmptyLine]:
    """Lines one after another; where blank ones meet, the longer run stays."""
    first, second = list(one), list(other)
    ending, starting = len(first) - len(_stripped(first)), 0
    while starting < len(second) and second[starting].comment is None:
        starting += 1
    return first + second[min(ending, starting) :] if ending else first + second


def finish(module: cst.Module) -> cst.Module:
    """Put `pass` where a block lost all it had."""

    class Fill(cst.CSTTransformer):
        def leave_Expr(self, original_node: cst.Expr, updated_node: cst.Expr) -> cst.BaseSmallStatement:
            value = updated_node.value
            is_gone = isinstance(value, cst.Name) and value.value == GONE
            return cst.Pass() if is_gone else updated_node

    changed = module.visit(Fill())
    assert isinstance(changed, cst.Module)
    return changed
