"""What statements set, and to what."""

from __future__ import annotations

from typing import TypeAlias

from wrapprec.migrate.rewrite.syntax import cst, each, text

Expression: TypeAlias = "cst.BaseExpression"


def assigned(node: cst.CSTNode) -> list[tuple[Expression, Expression]]:
    """The targets of a statement and what each gets; tuples on both sides are taken apart."""
    if isinstance(node, (cst.AnnAssign, cst.NamedExpr)) and node.value is not None:
        return [(node.target, node.value)] if isinstance(node.target, (cst.Name, cst.Attribute)) else []
    pairs: list[tuple[Expression, Expression]] = []
    if isinstance(node, cst.Assign):
        for target in node.targets:
            one, value = target.target, node.value
            if isinstance(one, (cst.Tuple, cst.List)):
                parts = [element.value for element in one.elements]
                both = isinstance(value, (cst.Tuple, cst.List)) and len(value.elements) == len(parts)
                values = [e.value for e in value.elements] if both else [value] * len(parts)  # type: ignore[attr-defined]
                pairs += zip(parts, values, strict=True)
            else:
                pairs.append((one, value))
    return pairs


def is_set(node: cst.CSTNode, up: cst.CSTNode | None) -> bool:
    """Whether a node is an attribute of a plain name that is set there."""
    if not isinstance(node, cst.Attribute) or not isinstance(node.value, cst.Name):
        return False
    if isinstance(up, (cst.Element, cst.AssignTarget)):
        return True
    return isinstance(up, cst.AnnAssign) and up.target is node


def moved(node: cst.CSTNode) -> list[cst.CSTNode]:
    """The names that a statement sets to something that is not written beside them."""
    if isinstance(node, (cst.For, cst.CompFor, cst.AugAssign)):
        return list(each(node.target))
    if isinstance(node, cst.AsName):
        return list(each(node.name))
    return []


def is_static(decorator: cst.Decorator) -> bool:
    """Whether a decorator is `staticmethod`."""
    return text(decorator.decorator) == "staticmethod"
