"""Imports that a rewritten file needs, and those that it no longer does."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from wrapprec.migrate.rewrite.apply import apply
from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.facts import AUTOCAST, SCALER
from wrapprec.migrate.rewrite.names import Names
from wrapprec.migrate.rewrite.syntax import cst, each, text

FAMILY = ("torch.amp", "torch.cuda.amp", "torch.cpu.amp", "apex.amp")
_PARTS = {
    ("torch", "autocast"), ("torch", "amp"), ("torch.cuda", "amp"), ("torch.cpu", "amp"), ("apex", "amp"),
}  # fmt: skip
_CONTEXTS = {
    ("contextlib", "nullcontext"), ("contextlib", "suppress"), ("", "contextlib"),
    ("functools", "partial"), ("", "functools"),
}  # fmt: skip
"""What a script imports for its contexts, and no longer needs where they went."""


def package_name(module: cst.Module) -> tuple[str, bool]:
    """What wrapprec is called in a file, and whether it is imported there."""
    for node in each(module):
        if isinstance(node, cst.ImportAlias) and text(node.name) == "wrapprec" and _is_plain_import(node, module):
            return (text(node.asname.name) if node.asname is not None else "wrapprec"), True
    return "wrapprec", False


def _is_plain_import(alias: cst.ImportAlias, module: cst.Module) -> bool:
    lines = [one for one in module.body if isinstance(one, cst.SimpleStatementLine)]
    return any(isinstance(part, cst.Import) and alias in part.names for line in lines for part in line.body)


def uses_wrapprec(module: cst.Module) -> bool:
    """Whether a file has anything to do with wrapprec."""
    for node in each(module):
        if isinstance(node, cst.ImportAlias) and text(node.name).split(".")[0] == "wrapprec":
            return True
        if (
            isinstance(node, cst.ImportFrom)
            and node.module is not None
            and text(node.module).split(".")[0] == "wrapprec"
        ):
            return True
    return False


def add_import(module: cst.Module) -> cst.Module:
    """Import wrapprec, behind the imports that torch's is among."""
    line = cst.parse_statement("import wrapprec\n")
    body = list(module.body)
    head = next((number for number, one in enumerate(body) if not _is_head(one)), len(body))
    of_torch = [number for number, one in enumerate(body) if _imports_torch(one)]
    imports = [number for number, one in enumerate(body) if _is_import(one)]
    early = [number for number in of_torch if number < head]
    if early or of_torch:
        at = early[-1] if early else of_torch[0]
    else:
        at = imports[-1] if imports else 0 if body and _is_docstring(body[0]) else -1
    return module.with_changes(body=[*body[: at + 1], line, *body[at + 1 :]])


def _is_import(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine) and isinstance(node.body[0], (cst.Import, cst.ImportFrom))


def _is_head(node: cst.CSTNode) -> bool:
    """Whether a statement may stand among the imports of a file."""
    return _is_import(node) or _is_docstring(node) or isinstance(node, (cst.Try, cst.If))


def _is_docstring(node: cst.CSTNode) -> bool:
    if not isinstance(node, cst.SimpleStatementLine) or not isinstance(node.body[0], cst.Expr):
        return False
    return isinstance(node.body[0].value, (cst.SimpleString, cst.ConcatenatedString))


def _imports_torch(node: cst.CSTNode) -> bool:
    if not isinstance(node, cst.SimpleStatementLine):
        return False
    return any(home.split(".")[0] == "torch" for part in node.body for home in _homes(part))


def _homes(part: cst.CSTNode) -> list[str]:
    if isinstance(part, cst.Import):
        return [text(alias.name) for alias in part.names]
    return [text(part.module)] if isinstance(part, cst.ImportFrom) and part.module is not None else []


def drop_aliases(names: Names, after: cst.Module) -> cst.Module:
    """Take away `autocast = torch.cuda.amp.autocast` where the code that went was the last to use it."""
    found = [node for node in names.nodes if isinstance(node, cst.Assign) and names.aliases(node, node.value)]
    known = {text(node) for node in found if names.qualified(node.value) & (AUTOCAST | SCALER)}
    then, now = _counted(names.module), _counted(after)
    plan = Plan()
    for node in each(after) if known else ():
        target = text(node.targets[0].target) if isinstance(node, cst.Assign) and text(node) in known else ""
        if target and now[target] == 1 < then[target]:
            plan.drop(node)
    # One that is gone may have been the last to use another.
    return drop_aliases(names, apply(after, [plan])[0]) if plan.edits else after


def _counted(module: cst.Module) -> Counter[str]:
    """How often each name stands in a file; attributes of something are no names."""
    attributes = {id(one.attr) for one in each(module) if isinstance(one, cst.Attribute)}
    return Counter(one.value for one in each(module) if isinstance(one, cst.Name) and id(one) not in attributes)


def drop_imports(before: cst.Module, after: cst.Module) -> cst.Module:
    """Take away what nothing uses any more: of amp, and what the code that went was the last to use."""
    now, then = _used(after), _used(before)
    plan = Plan()
    for node in each(after):
        if not isinstance(node, (cst.Import, cst.ImportFrom)) or isinstance(node.names, cst.ImportStar):
            continue
        home = text(node.module) if isinstance(node, cst.ImportFrom) and node.module is not None else ""
        free = [number for number, one in enumerate(node.names) if _is_free(home, one, now, then, after)]
        if len(free) == len(node.names):
            plan.drop(node)
        elif free:
            plan.edits[node] = lambda updated, free=free: _without(updated, free)  # type: ignore[misc]
    return apply(after, [plan])[0]


def _without(statement: Any, free: list[int]) -> Any:
    kept = [one for number, one in enumerate(statement.names) if number not in free]
    return statement.with_changes(names=[*kept[:-1], kept[-1].with_changes(comma=statement.names[-1].comma)])


def _is_free(
    home: str, alias: cst.ImportAlias, now: dict[str, set[str]], then: dict[str, set[str]], module: cst.Module
) -> bool:
    name = text(alias.name)
    bound = text(alias.asname.name) if alias.asname is not None else name
    if "apex" in (home or name).split(".") or name == "apex":  # what stands in for it was put there a moment ago
        home, name = (one.removeprefix("wrapprec.migrate").removeprefix(".") for one in (home, name))
    full = f"{home}.{name}" if home else name
    if not home and alias.asname is None and "." in name:  # `import torch.cuda.amp` binds `torch`
        used = any(one == name or one.startswith(name + ".") for one in now["chains"])
        return full in FAMILY and not used and _binds(module, name.split(".")[0], alias)
    if bound in now["names"]:
        return False
    if full == "apex":
        return bound in then["names"]
    amp = (home, name) in _PARTS or full in FAMILY or home in FAMILY
    return amp or (bound in then["names"] and (home, name) in _CONTEXTS)


def _used(module: cst.Module) -> dict[str, set[str]]:
    found: set[str] = set()
    chains: set[str] = set()

    class Look(cst.CSTVisitor):
        def visit_Import(self, node: cst.Import) -> bool:
            return False

        def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
            return False

        def visit_Name(self, node: cst.Name) -> None:
            found.add(node.value)

        def visit_Attribute(self, node: cst.Attribute) -> bool:
            chains.add(text(node))
            node.value.visit(self)
            return False

        def visit_Annotation(self, node: cst.Annotation) -> None:
            found.update(re.findall(r"\w+", text(node.annotation)))  # also in quotes

        def visit_Assign(self, node: cst.Assign) -> None:
            if text(node.targets[0].target) == "__all__":
                found.update(re.findall(r"\w+", text(node.value)))

    module.visit(Look())
    return {"names": found, "chains": chains}


def _binds(module: cst.Module, name: str, but: cst.ImportAlias) -> bool:
    """Whether another import binds a name, or nothing uses it."""
    for node in each(module):
        if isinstance(node, cst.Import):
            for alias in node.names:
                if alias is not but and alias.asname is None and text(alias.name).split(".")[0] == name:
                    return True
    return name not in _used(module)["names"]
