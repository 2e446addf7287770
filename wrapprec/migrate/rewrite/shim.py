"""What a script imports of Apex beside its amp: the same names of `wrapprec.migrate.apex`."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.names import Names
from wrapprec.migrate.rewrite.syntax import cst, each, text

_HOME = "wrapprec.migrate."


def plan_shim(names: Names, amp_stays: bool) -> Plan:
    """Plan the imports of Apex; its amp, where it is rewritten, goes by itself.

    Args:
        names: of the file.
        amp_stays: whether the use of Apex's amp is left; the rest is left with it then.
    """
    plan = Plan()
    imports = [node for node in names.nodes if isinstance(node, (cst.Import, cst.ImportFrom)) and _homes(node)]
    troubles = _troubles(imports, names)
    for node in imports:
        homes = _homes(node)
        others = [home for home in homes if not home.startswith("apex.amp")]
        if amp_stays:
            for home in others[:1] if not _is_amp_alone(node) else []:
                plan.keep(node, f"`{home}` stays with Apex's amp; wrapprec.migrate.apex has it too")
            continue
        missing = next((words for home in others if (words := _is_missing(node, home)) is not None), None)
        here = [(use, words) for use, words, by in troubles if node in by]
        if missing is not None:
            plan.keep(node, missing)
        for use, words in here:
            plan.keep(use, words)
        if missing is None and not here:
            _edit(node, plan)
    return plan


def _is_amp_alone(node: cst.Import | cst.ImportFrom) -> bool:
    """Whether a statement imports nothing of Apex but its amp, of which its uses speak."""
    if isinstance(node, cst.Import) or isinstance(node.names, cst.ImportStar):
        return all(home.startswith("apex.amp") for home in _homes(node))
    return _homes(node)[0].startswith("apex.amp") or all(text(alias.name) == "amp" for alias in node.names)


def _homes(node: cst.Import | cst.ImportFrom) -> list[str]:
    """The modules of Apex that a statement names."""
    if isinstance(node, cst.Import):
        found = [text(alias.name) for alias in node.names]
    else:
        found = [text(node.module)] if node.module is not None and not node.relative else []
    return [home for home in found if home.split(".")[0] == "apex"]


def _module(home: str) -> ModuleType | None:
    """The module that stands in for one of Apex; of a file within one of its packages, for the package."""
    for name in (home, home.rpartition(".")[0] if home.count(".") > 1 else home):
        try:
            return importlib.import_module(_HOME + name)
        except ModuleNotFoundError:
            continue
    return None


def _is_missing(node: cst.Import | cst.ImportFrom, home: str) -> str | None:
    """Say what a statement imports that wrapprec does not have."""
    module = _module(home)
    exact = module is not None and module.__name__ == _HOME + home
    if module is None or (not exact and (isinstance(node, cst.Import) or isinstance(node.names, cst.ImportStar))):
        return f"`{home}` stays: wrapprec.migrate.apex does not have it"
    for alias in node.names if isinstance(node, cst.ImportFrom) and not isinstance(node.names, cst.ImportStar) else ():
        if not hasattr(module, text(alias.name)):
            return f"`{home}.{text(alias.name)}` stays: wrapprec.migrate.apex does not have it"
    return None


def _troubles(
    imports: list[cst.Import | cst.ImportFrom], names: Names
) -> list[tuple[cst.CSTNode, str, list[cst.Import | cst.ImportFrom]]]:
    """The uses of what wrapprec lacks or refuses, with the statements that bind their names."""
    found: list[tuple[cst.CSTNode, str, list[cst.Import | cst.ImportFrom]]] = []
    inside = {id(one) for node in names.nodes if isinstance(node, (cst.Import, cst.ImportFrom)) for one in each(node)}
    stars = [node for node in imports if isinstance(node, cst.ImportFrom) and isinstance(node.names, cst.ImportStar)]
    for node in names.nodes:
        if not isinstance(node, (cst.Name, cst.Attribute)) or id(node) in inside:
            continue
        up = names.parent(node)
        if isinstance(up, cst.Attribute) or (isinstance(up, cst.Arg) and up.keyword is node):
            continue
        whole = next((one for one in names.qualified(node) if one.split(".")[0] == "apex"), None)
        called = isinstance(up, cst.Call) and up.func is node
        if whole is not None and not whole.startswith("apex.amp"):
            first = next(one for one in each(node) if isinstance(one, cst.Name))
            by = [one for one in imports if first.value in _bound(one)]
            homes = [home for one in by if isinstance(one, cst.ImportFrom) for home in _homes(one)]
            own = not by or names.symbol(first) in names.params  # something of the script has the name
            words = None if own else _trouble(_as_package(whole, homes), called)
            found += [] if words is None else [(node, words, by)]
        elif isinstance(node, cst.Name) and not isinstance(up, (cst.AssignTarget, cst.Param)):
            for star in stars if names.symbol(node) is None else []:
                home = _homes(star)[0]
                if node.value in getattr(_module(home), "__all__", ()):
                    words = _trouble(f"{home}.{node.value}", called)
                    found += [] if words is None else [(node, words, [star])]
    return found


def _as_package(whole: str, homes: list[str]) -> str:
    """A name by the package that the shim has for the file that it was imported from."""
    for home in homes:
        module = _module(home) if whole.startswith(f"{home}.") else None
        if module is not None:
            return module.__name__.removeprefix(_HOME) + whole.removeprefix(home)
    return whole


def _trouble(whole: str, called: bool) -> str | None:
    """Say why wrapprec cannot stand in for one name of Apex."""
    home, _, rest = whole.partition(".")
    parts = rest.split(".") if rest else []
    thing: object = _module(home)
    for part in parts:
        if not isinstance(thing, ModuleType):
            break  # a method or class attribute
        if not hasattr(thing, part):
            return f"`{whole}` stays: wrapprec.migrate.apex does not have it"
        thing = getattr(thing, part)
    words = inspect.getdoc(thing) if isinstance(thing, type) else None
    if words is not None and words.startswith("Refused: "):
        return f"`{whole}` stays, it has no counterpart: {words.removeprefix('Refused: ').rstrip('.')}"
    if called and whole.endswith(".multi_tensor_applier"):
        return f"`{whole}` stays, it has no counterpart: use torch._foreach_... functions"
    return None


def _bound(node: cst.Import | cst.ImportFrom) -> set[str]:
    """The names that a statement binds."""
    if isinstance(node.names, cst.ImportStar):
        return set()
    whole = [alias.asname.name if alias.asname is not None else alias.name for alias in node.names]
    return {text(one).split(".")[0] for one in whole}


def _edit(node: cst.Import | cst.ImportFrom, plan: Plan) -> None:
    if isinstance(node, cst.ImportFrom):
        assert node.module is not None
        module = _module(text(node.module))
        if module is not None:
            plan.write(node.module, module.__name__)
        return
    for alias in node.names:
        home = text(alias.name)
        if home.split(".")[0] != "apex":
            continue
        if alias.asname is not None:
            plan.write(alias.name, _HOME + home)
        elif len(node.names) == 1:
            names = [cst.ImportAlias(cst.Name("apex"))]
            plan.edits[node] = lambda updated, names=names: cst.ImportFrom(  # type: ignore[misc]
                module=cst.Attribute(cst.Name("wrapprec"), cst.Name("migrate")),
                names=names,
                semicolon=updated.semicolon,
            )
        else:  # `import os, apex`
            as_apex = cst.AsName(cst.Name("apex"))
            plan.edits[alias] = lambda updated, as_apex=as_apex: updated.with_changes(  # type: ignore[misc]
                name=cst.parse_expression(_HOME + "apex"), asname=as_apex
            )
