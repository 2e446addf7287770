"""The one place where libcst comes in: it is optional, and only the rewriter needs it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from wrapprec.errors import WrapprecError, message

__all__ = ["COMPOUND", "cst", "each", "meta", "same", "text"]


class MissingLibcstError(WrapprecError, ImportError):
    """The rewriter was asked for, and libcst is not installed."""


def _load() -> tuple[ModuleType, ModuleType]:
    try:
        import libcst
        import libcst.metadata
    except ImportError as error:
        raise MissingLibcstError(
            message(
                "the package libcst, which reads and writes source without changing its form",
                f"{type(error).__name__}: {error}",
                remedy="pip install 'wrapprec[migrate]'",
            )
        ) from error
    return libcst, libcst.metadata


if TYPE_CHECKING:
    import libcst as cst
    import libcst.metadata as meta
else:
    cst, meta = _load()

COMPOUND = (cst.If, cst.For, cst.While, cst.With, cst.Try, cst.FunctionDef, cst.ClassDef)
"""Statements that hold blocks."""


def each(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """A node and everything below it, in the order of the text."""
    yield node
    for child in node.children:
        yield from each(child)


def text(node: cst.CSTNode) -> str:
    """The source of a node."""
    return cst.Module([]).code_for_node(node)


def same(one: cst.CSTNode, other: cst.CSTNode) -> bool:
    """Whether two nodes say the same, whatever their comments and layout."""
    return _bare(one) == _bare(other)


def _bare(node: cst.CSTNode) -> object:
    layout: tuple[type[cst.CSTNode], ...] = (
        cst.Comment,
        cst.EmptyLine,
        cst.TrailingWhitespace,
        cst.Comma,
        cst.Semicolon,
    )
    layout += (cst.SimpleWhitespace, cst.ParenthesizedWhitespace, cst.Newline, cst.LeftParen, cst.RightParen)
    if isinstance(node, (cst.Name, cst.Integer, cst.Float, cst.Imaginary, cst.SimpleString)):
        return (type(node).__name__, node.value)
    if isinstance(node, cst.FormattedStringText):
        return node.value
    if isinstance(node, cst.SimpleStatementSuite):  # `if x: y` says what a block of one line says
        return ("IndentedBlock", (("SimpleStatementLine", tuple(_bare(one) for one in node.body)),))
    kept = tuple(_bare(child) for child in node.children if not isinstance(child, layout))
    return (type(node).__name__, kept)
