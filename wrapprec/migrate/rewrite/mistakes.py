"""Mistakes that people make with a scaler: those that go with it, and one that stays."""

from __future__ import annotations

from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.names import Function, Names
from wrapprec.migrate.rewrite.place import chain
from wrapprec.migrate.rewrite.syntax import cst

CLIPS = {"torch.nn.utils.clip_grad_norm_", "torch.nn.utils.clip_grad_value_"}


def note_mistakes(function: Function, plan: Plan, names: Names) -> None:
    """Say where gradients were clipped while scaled, and where a scheduler steps before the optimizer.

    Args:
        function: where a scaler is used.
        plan: gets the notes.
        names: of the file.
    """
    calls = [node for node in names.nodes if isinstance(node, cst.Call) and names.function(node) is function]
    methods = [(call, call.func.attr.value) for call in calls if isinstance(call.func, cst.Attribute)]
    unscaled = [names.line(call) for call, name in methods if name == "unscale_"]
    steps = [call for call, name in methods if name == "step" and call.args]
    for call in calls:
        clips = names.qualified(call.func) & CLIPS
        if clips and steps and not any(line < names.line(call) for line in unscaled):
            plan.note(call, "this clipped scaled gradients; they are true now, and the threshold means what it says")
    for call, name in methods:
        if name == "step" and not call.args and _is_scheduler(call, names):
            here = chain(call, names)[0][0]
            if any(names.line(one) > names.line(call) and chain(one, names)[0][0] is here for one in steps):
                plan.note(call, "this scheduler steps before the optimizer, and skips its first value: put it behind")


def _is_scheduler(call: cst.Call, names: Names) -> bool:
    assert isinstance(call.func, cst.Attribute)
    symbol = names.symbol(call.func.value)
    roots = names.roots(symbol) if symbol is not None else frozenset()
    made = [value for root in roots for _, value in names.values.get(root, []) if isinstance(value, cst.Call)]
    found = {name for value in made for name in names.qualified(value.func)}
    return any(name.startswith("torch.optim.lr_scheduler.") for name in found)
