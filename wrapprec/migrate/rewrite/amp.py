"""From torch.amp: autocast and GradScaler go, and one line with `wrap` comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wrapprec.migrate.rewrite.casts import Region, outside, trained_elsewhere
from wrapprec.migrate.rewrite.edits import Fork, Plan, wrap_call
from wrapprec.migrate.rewrite.facts import Reason, constant, statement
from wrapprec.migrate.rewrite.mistakes import note_mistakes
from wrapprec.migrate.rewrite.names import Names, Symbol
from wrapprec.migrate.rewrite.passing import pass_on
from wrapprec.migrate.rewrite.place import Place, find_place, home, models_of, spelled
from wrapprec.migrate.rewrite.scalers import Uses, decide_tests
from wrapprec.migrate.rewrite.settings import conjunction, read_settings
from wrapprec.migrate.rewrite.syntax import cst, text
from wrapprec.migrate.rewrite.units import Unit, find_units, leave_callers

_ALONE = (
    "there is no autocast that goes with this scaler in this file:"
    " give it enabled=False when what it trains is wrapped where it is made"
)
_OUTSIDE = "call wrapprec.wrap where it is made, and take autocast away here"


@dataclass
class Wrap:
    """One line with `wrap` to be.

    Args:
        uses: of the scaler that it replaces.
        optimizers: roots.
        models: roots.
    """

    uses: Uses | None
    optimizers: list[Symbol]
    models: list[Symbol]


def plan_amp(names: Names, package: str) -> list[Plan]:
    """Plan the edits of every group of a file.

    Args:
        names: of the file.
        package: what wrapprec is called in it.
    """
    units = find_units(names)
    for unit in units:
        _plan(unit, names, package)
    leave_callers(units, names)
    return [unit.plan for unit in units]


def _plan(unit: Unit, names: Names, package: str) -> None:
    plan = unit.plan
    for region in unit.regions:
        if region.cast.off and region.models:
            plan.leave(region.item, "a model runs with autocast switched off here, and would not any more")
        elif not region.cast.off and not region.models:
            plan.leave(region.item, "what runs under this autocast is no model that this file makes and trains")
    working = [region for region in unit.regions if not region.cast.off]
    if unit.scalers and not working and not plan.reasons:
        plan.leave(unit.scalers[0][1].scaler.call, _ALONE)
    if plan.reasons:
        return
    wraps = _wraps(unit, working, names)
    plan.serves = {root for wrap in wraps for root in (*wrap.models, *wrap.optimizers)}
    for region in working:
        if region.inside is None:
            trouble = outside(region, {model for one in wraps for model in one.models}, working, names)
            plan.reasons += [] if trouble is None else [trouble]
    elsewhere = trained_elsewhere({model for one in wraps for model in one.models}, working, names)
    plan.reasons += [] if elsewhere is None else [elsewhere]
    for wrap in wraps:
        if not plan.reasons:
            _write(wrap, unit, working, names, package)
    if plan.reasons:
        return
    for region in unit.regions:
        plan.drop(region.item)
        for fork in region.forks:
            plan.forks.setdefault(fork, Fork("keep"))
    for function in {one for _, uses in unit.scalers for one in uses.functions}:
        note_mistakes(function, plan, names)
    for cast in unit.casts:
        for one in cast.statements:
            plan.drop(one)
        pass_on(cast.contexts, set(), None, plan, names)


def _wraps(unit: Unit, working: list[Region], names: Names) -> list[Wrap]:
    """Which models and optimizers each line wraps."""
    plan = unit.plan
    wraps: list[Wrap] = []
    run = [model for region in working for model in sorted(region.models, key=lambda one: one[1])]
    for _, uses in unit.scalers:
        if not uses.optimizers:
            plan.leave(uses.scaler.call, "no optimizer is stepped by this scaler in this file")
        wraps.append(Wrap(uses, list(dict.fromkeys(uses.optimizers)), []))
    stepped = {one for wrap in wraps for one in wrap.optimizers}
    rest = [one for one in unit.optimizers if one not in stepped]
    if not wraps:
        wraps.append(Wrap(None, [], []))
    wraps[0].optimizers += rest
    taken: dict[Symbol, Wrap] = {}
    for wrap in wraps:
        for optimizer in wrap.optimizers:
            models, reasons = models_of(optimizer, names)
            plan.reasons += reasons
            for model in models:
                if taken.setdefault(model, wrap) is not wrap:
                    plan.leave(names.uses[model][0], f"two scalers are used for the model `{model[1]}`")
                wrap.models += [model] if model not in wrap.models else []
    if not any(wrap.optimizers for wrap in wraps):
        wraps[0].models = list(dict.fromkeys(run))
    else:
        for model in dict.fromkeys(run):
            if model not in taken and all(model not in wrap.models for wrap in wraps):
                words = f"`{model[1]}` has no optimizer, is not wrapped, and computes in float32 now"
                plan.note(names.uses[model][0], words)
    return wraps


def _write(wrap: Wrap, unit: Unit, working: list[Region], names: Names, package: str) -> None:
    plan = unit.plan
    place = _find(wrap, names)
    if isinstance(place, Reason):
        plan.reasons.append(place)
        return
    line = names.last(place.after) + 1
    called = [spelled(root, place.function, line, names) for root in (*wrap.models, *wrap.optimizers)]
    if None in called:
        plan.leave(place.after, "model and optimizer are not both at hand here")
        return
    parts = [_several(called[: len(wrap.models)]), *([_several(called[len(wrap.models) :])] if wrap.optimizers else [])]
    keywords = read_settings(wrap.uses, bool(wrap.optimizers), unit.plan, working, place, names, package)
    if keywords is None:
        return
    policy = keywords.pop("policy")
    parts.append(policy if wrap.optimizers else f"policy={policy}")
    parts += [f"{key}={value}" for key, value in keywords.items()]
    target = ""
    if wrap.uses is not None:
        target = _hand_over(wrap, wrap.uses, place, "enabled" in keywords, plan, names, package)
    code = wrap_call(package, parts, target)
    whole = place.after
    only = whole.body[0] if isinstance(whole, cst.SimpleStatementLine) and len(whole.body) == 1 else None
    if wrap.uses is not None and only in wrap.uses.scaler.statements and whole not in plan.behind:
        plan.edits[only] = _statement(code)  # the scaler's own line becomes the new one, and keeps its comments
    else:
        plan.behind.setdefault(whole, []).append(code)
    plan.wraps = True


def _several(called: list[str | None]) -> str:
    return str(called[0]) if len(called) == 1 else f"[{', '.join(map(str, called))}]"


def _find(wrap: Wrap, names: Names) -> Place | Reason:
    needed = [*wrap.models, *wrap.optimizers]
    if wrap.uses is not None:
        call = wrap.uses.scaler.call
        function = names.function(call)
        whole = wrap.uses.scaler.fork or statement(call, names)
        if all(spelled(root, function, names.line(whole), names) for root in needed):
            place = find_place(function, needed, wrap.models, whole, names)
            if isinstance(place, Place):
                return place
    roots = wrap.optimizers or wrap.models
    made = [node for root in roots for node, _ in names.values.get(root, [])]
    if not made:
        one = names.uses[roots[0]][0]
        return Reason(one, f"`{roots[0][1]}` comes from outside of this file: {_OUTSIDE}")
    return find_place(names.function(made[-1]), needed, wrap.models, None, names)


def _hand_over(wrap: Wrap, uses: Uses, place: Place, flagged: bool, plan: Plan, names: Names, package: str) -> str:
    """The scaler's own lines go, and the handle stands where its state or scale was used.

    Returns:
        What the line with `wrap` sets; the empty text where nothing needs the handle.
    """
    scaler = uses.scaler
    made = names.function(scaler.call)
    for node in scaler.statements:
        plan.drop(node)
    if scaler.fork is not None:
        plan.forks[scaler.fork] = Fork("body")
    spell: Callable[[cst.BaseExpression], str] = uses.spelled
    for use in uses.handles:
        plan.edits.setdefault(use, _named(spell(use)))
        if names.function(use) is place.function and names.line(use) <= names.line(place.after):
            plan.leave(use, "the scaler is used before model and optimizer are made")
    if len(wrap.models) > 1 and uses.asked:
        plan.leave(uses.asked[0], "one scale is read here, and each of several models has its own now")
    needed = pass_on(uses.family, set(uses.handles), spell, plan, names)
    always = not scaler.optional and not _may_be_none(uses, names)

    def flag(node: cst.CSTNode) -> str | None:
        here = Place(names.function(node), node, node)
        return conjunction(scaler.enabled, here, names) or None if scaler.optional else None

    decide_tests(uses, always, flag, plan)
    if scaler.symbol not in needed:
        return ""
    target = names.values[scaler.symbol][0][0]
    name = text(_target(target))
    where = home(scaler.symbol)
    if where is place.function or names.lineage.related(where, names.class_of(place.function)):
        return spell(_target(target))
    model = spelled(wrap.models[0], made, names.line(scaler.call), names)
    if made is None or model is None or flagged:
        plan.leave(scaler.call, f"the state or scale of `{name}` is used where the handle would not be at hand")
        return ""
    plan.edits[statement(scaler.call, names)] = _statement(f"{spell(_target(target))} = {package}.handle_of({model})")
    return ""


def _named(name: str) -> Callable[[cst.CSTNode], cst.CSTNode]:
    return lambda updated: cst.parse_expression(name)


def _statement(code: str) -> Callable[[cst.CSTNode], cst.CSTNode]:
    def edit(updated: cst.CSTNode) -> cst.CSTNode:
        line = cst.parse_statement(code + "\n")
        assert isinstance(line, cst.SimpleStatementLine)
        return line.body[0]

    return edit


def _target(node: cst.CSTNode) -> cst.BaseExpression:
    return node.targets[0].target if isinstance(node, cst.Assign) else node.target  # type: ignore[attr-defined]


def _may_be_none(uses: Uses, names: Names) -> bool:
    for symbol in uses.family:
        function = names.params.get(symbol)
        if function is not None and symbol not in names.values:
            bound = [names.bind(call, function).get(symbol[1]) for call in names.calls.get(function, [])]
            if any(arg is None or constant(arg.value) == "None" for arg in bound):
                return True
    return False
