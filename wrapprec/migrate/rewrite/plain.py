"""Plain float32 loops: nothing goes, and one line with `wrap` comes."""

from __future__ import annotations

from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.facts import Reason
from wrapprec.migrate.rewrite.found import optimizers
from wrapprec.migrate.rewrite.names import Names, Symbol
from wrapprec.migrate.rewrite.place import Place, find_place, models_of, spelled
from wrapprec.migrate.rewrite.syntax import cst, text

MANAGERS = (
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "deepspeed",
    "apex",
    "colossalai",
    "ignite",
)
"""Packages that manage precision themselves; docs/migrating.md says how to come from each."""
_HALVES = (
    ".half()",
    ".bfloat16()",
    ".double()",
    "set_default_dtype(",
    "torch.float16",
    "torch.bfloat16",
    "torch.float64",
)
_BY_HAND = {
    "FP16Model",
    "FP16_Optimizer",
    "convert_network",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "tofp16",
}
"""What sets a precision among the tools of Apex beside its amp, also under the names of wrapprec."""


def plan_plain(
    names: Names,
    package: str,
    policy: str,
    harmless: frozenset[str] = frozenset(),
    passed: frozenset[Symbol] = frozenset(),
) -> list[Plan]:
    """Plan one line for every group of models and optimizers that a plain loop trains.

    Args:
        names: of the file.
        package: what wrapprec is called in it.
        policy: for `wrap`.
        harmless: managers of precision that do nothing of it in this file.
        passed: optimizers that functions of other files step.
    """
    groups: list[tuple[list[Symbol], list[Symbol], Plan]] = []
    for optimizer in optimizers(names):
        if optimizer not in passed and not _is_stepped(optimizer, names):
            continue
        models, reasons = models_of(optimizer, names)
        mine = Plan(reasons=reasons)
        for group in [one for one in groups if set(one[0]) & set(models)]:
            groups.remove(group)
            models = list(dict.fromkeys([*group[0], *models]))
            mine.reasons = [*group[2].reasons, *mine.reasons]
            groups.append((models, [*group[1], optimizer], mine))
            break
        else:
            groups.append((models, [optimizer], mine))
    if not passed and not any(
        text(node.func).endswith(".backward") for node in names.nodes if isinstance(node, cst.Call)
    ):
        return []
    manager = manager_of(names, harmless)
    for models, made, plan in groups:
        plan.serves = {*models, *made}
        if manager is not None:
            plan.reasons.append(manager)
        if not plan.reasons:
            _place(models, made, plan, names, package, policy)
    return [plan for _, _, plan in groups]


def place_reason(place: Place) -> Reason:
    """Why nothing can be put at a place."""
    return Reason(place.after, "model, optimizer and scale are not all at hand here")


def _is_stepped(optimizer: Symbol, names: Names) -> bool:
    used = [names.parent(use) for one in names.family(optimizer) for use in names.uses[one]]
    return any(isinstance(up, cst.Attribute) and up.attr.value == "step" for up in used)


def manager_of(names: Names, harmless: frozenset[str] = frozenset()) -> Reason | None:
    """What in a file may manage precision, if anything does."""
    for node in names.nodes:
        homes: list[str] = []
        if isinstance(node, cst.Import):
            homes = [text(alias.name) for alias in node.names]
        elif isinstance(node, cst.ImportFrom) and node.module is not None:
            homes = [text(node.module)]
        for home in homes:
            if home.split(".")[0] in MANAGERS and home.split(".")[0] not in harmless:
                return Reason(node, f"{home.split('.')[0]} may manage precision here: see docs/migrating.md")
        if isinstance(node, (cst.Call, cst.Attribute)) and text(node).endswith(_HALVES):
            return Reason(node, f"`{text(node)}`: this file sets a precision itself")
        if isinstance(node, cst.Call) and text(node.func).rpartition(".")[2] in _BY_HAND:
            return Reason(node, f"`{text(node.func)}`: this file sets a precision itself, with Apex's tools")
        if isinstance(node, cst.Call) and "set_default_dtype" in text(node.func):
            return Reason(node, f"`{text(node)}`: this file sets a precision itself")
    return None


def _place(models: list[Symbol], made: list[Symbol], plan: Plan, names: Names, package: str, policy: str) -> None:
    nodes = [node for optimizer in made for node, _ in names.values[optimizer]]
    place = find_place(names.function(nodes[-1]), [*models, *made], models, None, names)
    if isinstance(place, Reason):
        plan.reasons.append(place)
        return
    line = names.last(place.after) + 1
    called = [spelled(root, place.function, line, names) for root in (*models, *made)]
    if None in called:
        plan.leave(place.after, "model and optimizer are not both at hand here")
        return
    parts = [str(one) for one in called]
    first, second = parts[: len(models)], parts[len(models) :]
    sides = [one[0] if len(one) == 1 else f"[{', '.join(one)}]" for one in (first, second)]
    plan.behind[place.after] = [f'{package}.wrap({", ".join(sides)}, "{policy}")']
    plan.wraps = True
