"""Connected groups of uses: what shares a function, model, optimizer or scaler is edited together or not at all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from wrapprec.migrate.rewrite.casts import Region, read_casts, without_gradients
from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.facts import Cast, Reason, Scaler, made_of
from wrapprec.migrate.rewrite.foreign import read_foreign
from wrapprec.migrate.rewrite.found import optimizers, read_scalers
from wrapprec.migrate.rewrite.names import Expression, Function, Names, Symbol
from wrapprec.migrate.rewrite.place import home, models_of
from wrapprec.migrate.rewrite.scalers import Uses
from wrapprec.migrate.rewrite.syntax import cst


@dataclass
class Unit:
    """One connected group.

    Args:
        plan: its edits, or the reasons why there are none.
        regions: the code under autocast.
        casts: the autocasts.
        scalers: the scalers with all their uses.
        optimizers: roots.
        handle: the name that its handle gets.
        scales: whether a scaler belongs to it, known or not.
        functions: those that it has a part in.
    """

    plan: Plan
    regions: list[Region] = field(default_factory=list)
    casts: list[Cast] = field(default_factory=list)
    scalers: list[tuple[object, Uses]] = field(default_factory=list)
    optimizers: list[Symbol] = field(default_factory=list)
    handle: str = "handle"
    scales: bool = False
    functions: set[Function] = field(default_factory=set)


class _Groups:
    """Union-find."""

    def __init__(self) -> None:
        self._above: dict[Hashable, Hashable] = {}

    def find(self, key: Hashable) -> Hashable:
        above = self._above.setdefault(key, key)
        while above != self._above[above]:
            above = self._above[above]
        self._above[key] = above
        return above

    def join(self, keys: Iterable[Hashable]) -> None:
        first, *rest = keys
        for key in rest:
            self._above[self.find(key)] = self.find(first)


def fresh(name: str, names: Names) -> str:
    """A name that the file does not have yet."""
    used = {node.value for node in names.nodes if isinstance(node, cst.Name)}
    candidates = [name, f"precision_{name}", *(f"{name}{number}" for number in range(2, 1000))]
    return next(one for one in candidates if one not in used)


def handle_name(use: Expression, handle: str) -> str:
    """The handle's name in the place of a scaler's: an attribute stays one."""
    return f"{use.value.value}.{handle}" if isinstance(use, cst.Attribute) else handle  # type: ignore[attr-defined]


def find_units(names: Names) -> list[Unit]:
    """Find all groups of a file that use torch's automatic mixed precision."""
    casts = read_casts(names)
    scalers, reasons = read_scalers(names)
    scaling = {id(reason) for reason in reasons}
    groups = _Groups()
    members: list[tuple[Hashable, Callable[[Unit], None]]] = []

    def function_key(node: cst.CSTNode) -> Hashable:
        return ("function", names.function(node))

    reasons += casts.reasons
    for region in casts.regions:
        if region.inside is not None:
            if region.cast.off:
                continue  # an island of float32 inside a model: autocast inside forward is honoured
            region.models = _instances(region.inside, names)
            if not region.models:
                words = "the model that this belongs to is made in another file; wrapprec honours autocast in a forward"
                reasons.append(Reason(region.item, words))
                continue
        key: Hashable = ("function", region.function)
        groups.join([key, function_key(region.cast.call), *region.models])
        members.append((key, lambda unit, region=region: unit.regions.append(region)))  # type: ignore[misc]
    for reason, stepped in read_foreign([one for scaler in scalers for one in names.family(scaler.symbol)], names):
        groups.join([function_key(reason.node), *stepped])
        scaling.add(id(reason))
        reasons.append(reason)
    handle = fresh("handle", names)
    for number, scaler in enumerate(scalers):
        own = Plan()
        mine = handle if number == 0 else f"{handle}{number + 1}"
        uses = Uses(scaler, own, names, lambda use, mine=mine: handle_name(use, mine))  # type: ignore[misc]
        key = ("function", names.function(scaler.call))
        groups.join([key, *(("function", one) for one in uses.functions), *uses.family, *uses.optimizers])
        groups.join([key, *(("function", one.function) for one in casts.regions if _shares(one, scaler, names))])
        members.append((key, lambda unit, uses=uses, own=own: _take(unit, uses, own)))  # type: ignore[misc]
    made = optimizers(names)
    for optimizer in made:
        models, _ = models_of(optimizer, names)
        used = [model for model in models if any(model in region.models for region in casts.regions)]
        groups.join([optimizer, *used])
        members.append((optimizer, lambda unit, one=optimizer: unit.optimizers.append(one)))  # type: ignore[misc]
    for reason in reasons:
        key = function_key(reason.node)
        scales = id(reason) in scaling
        members.append((key, lambda unit, one=reason, scales=scales: _leave(unit, one, scales, names)))  # type: ignore[misc]
    units: dict[Hashable, Unit] = {}
    for key, add in members:
        unit = units.setdefault(groups.find(key), Unit(Plan(), handle=handle))
        add(unit)
    found = [unit for unit in units.values() if unit.regions or unit.scalers or unit.plan.reasons]
    for unit in found:
        unit.casts = list(dict.fromkeys(region.cast for region in unit.regions))
        unit.functions |= {region.function for region in unit.regions}
    return found


def _shares(region: Region, scaler: Scaler, names: Names) -> bool:
    """Whether a region is in a class above or below the one that holds a scaler: one object has both then."""
    owner, other = scaler.symbol[0], names.class_of(region.function)
    return owner is not other and names.lineage.related(owner, other)


def _take(unit: Unit, uses: Uses, own: Plan) -> None:
    unit.scalers.append((uses.scaler, uses))
    unit.functions |= uses.functions
    unit.scales = True
    unit.plan.edits |= own.edits
    unit.plan.reasons += own.reasons


def _leave(unit: Unit, reason: Reason, scales: bool, names: Names) -> None:
    unit.plan.reasons.append(reason)
    unit.functions.add(names.function(reason.node))
    unit.scales |= scales


def leave_callers(units: list[Unit], names: Names) -> None:
    """Leave what calls code that stays: a loss without its scale would run through autocast that is still there."""
    more = True
    while more:
        more = False
        for kept in [unit for unit in units if unit.plan.reasons]:
            calls = [(one, call) for one in kept.functions if one is not None for call in names.calls.get(one, [])]
            for function, call in calls:
                if without_gradients(call, names) or without_gradients(function, names):
                    continue
                for unit in units:
                    bound = names.function(call) in unit.functions and (unit.scales or kept.scales)
                    if bound and unit is not kept and not unit.plan.reasons:
                        unit.plan.leave(call, f"`{function.name.value}`, which this calls, is left as it is")
                        more = True


def _instances(owner: cst.ClassDef, names: Names) -> set[Symbol]:
    """The variables that hold a model made of a class."""
    found: set[Symbol] = set()
    for symbol, values in list(names.values.items()):
        if isinstance(home(symbol), cst.ClassDef) and home(symbol) is owner:
            continue
        if any(isinstance(value, cst.Call) and owner in made_of(value, names) for _, value in values):
            found |= names.roots(symbol)
    return found
