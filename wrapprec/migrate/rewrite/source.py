"""One source text in, one out: read what it says, plan, edit, and say what was left and why."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from wrapprec.errors import WrapprecError, message
from wrapprec.migrate.rewrite.amp import plan_amp
from wrapprec.migrate.rewrite.apex import plan_apex
from wrapprec.migrate.rewrite.apply import apply, finish
from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.facts import Reason
from wrapprec.migrate.rewrite.halves import plan_halves
from wrapprec.migrate.rewrite.imports import add_import, drop_aliases, drop_imports, package_name, uses_wrapprec
from wrapprec.migrate.rewrite.loops import served_by, unspoken
from wrapprec.migrate.rewrite.names import Function, Names
from wrapprec.migrate.rewrite.plain import plan_plain
from wrapprec.migrate.rewrite.shim import plan_shim
from wrapprec.migrate.rewrite.syntax import cst
from wrapprec.migrate.rewrite.trainers import Elsewhere, Trainer

_WORDS = ("backward", "autocast", "scaler", "apex", "half")
"""One of these stands in every file that there is anything to say about; the others need no names looked up."""


@dataclass(frozen=True, order=True)
class Remark:
    """A line of the source, and what to know of it.

    Args:
        line: from 1, in the source as it was.
        words: a reason, or a note.
    """

    line: int
    words: str


@dataclass(frozen=True)
class Result:
    """What became of a source.

    Args:
        module: the new tree; the old one where nothing changed.
        changed: whether anything did.
        left: what is left as it is, and why.
        notes: what to know of the edits.
        trains: the trainers of other files that it calls, and whether what they get is wrapped or spoken of here.
    """

    module: cst.Module
    changed: bool
    left: tuple[Remark, ...]
    notes: tuple[Remark, ...]
    trains: tuple[tuple[Trainer, bool], ...] = ()


def rewrite(module: cst.Module, policy: str = "auto", elsewhere: Elsewhere | None = None) -> Result:
    """Rewrite a parsed file.

    Args:
        module: the file.
        policy: for loops that had no mixed precision.
        elsewhere: the trainers of the other files that are given.

    Returns:
        The new tree, and what there is to say.

    >>> result = rewrite(cst.parse_module("import torch\\nwith torch.autocast('cuda'):\\n    y = f(x)\\n"))
    >>> result.changed, [remark.line for remark in result.left]
    (False, [2])
    """
    elsewhere = elsewhere or Elsewhere()
    if not any(word in module.code.lower() for word in _WORDS) and not elsewhere.is_named_in(module.code):
        return Result(module, False, (), ())
    names = Names(module)
    package, imported = package_name(module)
    known = uses_wrapprec(module)
    calls = elsewhere.calls(names)
    passed = frozenset(root for _, roots in calls for root in roots)
    apex = plan_apex(names, package)
    kinds = [plan_amp(names, package), apex, plan_halves(names, package)]
    _part(kinds, names)
    plans = [plan for kind in kinds for plan in kind]
    if known:
        plans = [_already(plan) for plan in plans]
    elif not plans:
        beside = plan_shim(names, amp_stays=False)  # of Apex, only amp and what the shim lacks manage precision
        plans += plan_plain(names, package, policy, frozenset() if beside.kept else frozenset({"apex"}), passed)
    while True:
        ready = [plan for plan in plans if not plan.reasons and (plan.edits or plan.behind)]
        shim = plan_shim(names, amp_stays=any(plan.reasons for plan in apex))
        ready += [shim] if shim.edits else []
        changed, failures = apply(names.module, ready)
        for plan, reason in failures:
            plan.reasons.append(reason)
        if not failures:
            break
    loops = unspoken(plans, names, known)
    left = _remarks([*shim.kept, *loops, *(reason for plan in plans for reason in plan.reasons)], names)
    served = served_by(plans, names)
    trains = tuple((trainer, bool(roots) and roots <= served) for trainer, roots in calls)
    if not ready:
        return Result(module, False, left, (), trains)
    if not imported and any(plan.wraps for plan in ready):
        changed = add_import(changed)
    new = finish(drop_imports(names.module, drop_aliases(names, changed)))
    _check(new)
    return Result(new, True, left, _remarks([note for plan in ready for note in plan.notes], names), trains)


def _part(kinds: Sequence[Sequence[Plan]], names: Names) -> None:
    """Leave functions where several kinds of mixed precision meet: they share a model, and one line cannot be both."""
    where = [[(plan, _functions(plan, names)) for plan in kind] for kind in kinds]
    for number, kind in enumerate(where):
        for plan, functions in kind:
            for other, more in [one for rest in where[number + 1 :] for one in rest]:
                if functions & more:
                    for one in (plan, other):
                        nodes = [reason.node for reason in one.reasons] + [*one.edits, *one.behind]
                        one.leave(nodes[0], "several kinds of mixed precision are used together here: keep one by hand")


def _functions(plan: Plan, names: Names) -> set[Function]:
    nodes = [*plan.edits, *plan.behind, *(reason.node for reason in plan.reasons)]
    return {names.function(node) for node in nodes if not isinstance(node, (cst.Import, cst.ImportFrom))}


def _already(plan: Plan) -> Plan:
    if not plan.reasons:
        nodes = [*plan.edits, *plan.behind]
        plan.reasons = [Reason(node, "this file uses wrapprec already: finish by hand") for node in nodes[:1]]
    return plan


def _remarks(reasons: Sequence[Reason], names: Names) -> tuple[Remark, ...]:
    return tuple(sorted({Remark(names.line(one.node), one.words) for one in reasons}))


def _check(module: cst.Module) -> None:
    """Never hand out what Python cannot read."""
    try:
        ast.parse(module.bytes)
    except SyntaxError as error:
        raise WrapprecError(
            message(
                "a rewritten file that Python can read",
                f"{error}",
                remedy="this is a defect of the rewriter: please report the file; it was not changed",
            )
        ) from error
