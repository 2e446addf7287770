"""What autocast and scaler say of precision, as the arguments of `wrap`."""

from __future__ import annotations

from wrapprec.migrate.rewrite.casts import Region
from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.facts import Flag, constant
from wrapprec.migrate.rewrite.found import numbers
from wrapprec.migrate.rewrite.names import Names
from wrapprec.migrate.rewrite.place import Place, carry, translate
from wrapprec.migrate.rewrite.scalers import Uses, scaler_flags
from wrapprec.migrate.rewrite.syntax import cst, text


def read_settings(
    uses: Uses | None, trains: bool, plan: Plan, working: list[Region], place: Place, names: Names, package: str
) -> dict[str, str] | None:
    """Policy, loss scale and flags as code, in the order of `wrap`.

    Args:
        uses: of the scaler, if there is one.
        trains: whether there is an optimizer.
        plan: gets the reason, where they cannot be written at the place.
        working: the code under autocast.
        place: where `wrap` goes.
        names: of the file.
        package: what wrapprec is called in it.

    Returns:
        None where there is a reason against.
    """
    scaling: list[Flag] = [] if uses is None else scaler_flags(uses.scaler, place.block, names)
    tests = {} if uses is None else {test: asks for test, asks, _ in uses.tests}
    policies: dict[str, Region] = {}
    conditions: dict[str, Region] = {}
    for region in working:
        kind, what = region.cast.choice
        written = what if isinstance(what, str) else carry(what, place, names)
        if kind == "device" and written is not None:
            written = f"torch.get_autocast_dtype({written})" if _has_torch(names) else None
        flags = [flag for one in region.flags for flag in (scaling if tests.get(one.test) else [one])]
        condition = conjunction(flags, place, names)
        if written is None or condition is None:
            plan.leave(region.item, "what its precision depends on is not known where the model is wrapped")
            return None
        policies.setdefault(written, region)
        if region.inside is None:
            conditions.setdefault(condition, region)
    for found in (policies, conditions):
        if len(found) > 1:
            one, other = list(found)[:2]
            words = f"autocast is used in several ways for one model: `{one}` and `{other}`"
            plan.leave(list(found.values())[1].item, words)
            return None
    (policy,) = policies
    enabled = next(iter(conditions), "")
    settings = {"policy": policy}
    if uses is not None:
        scale = _scale(uses, scaling, settings["policy"], enabled, place, plan, names, package)
        if scale is None:
            return None
        settings |= {"loss_scale": scale} if scale else {}
    elif policy == '"16-mixed"' and trains:
        plan.note(place.after, "float16 was trained without a scaler; it gets a loss scale now")
    return settings | ({"enabled": enabled} if enabled else {})


def _has_torch(names: Names) -> bool:
    imports = [node for node in names.nodes if isinstance(node, cst.ImportAlias)]
    return any(text(node.name) == "torch" and node.asname is None for node in imports)


def conjunction(flags: list[Flag], place: Place, names: Names) -> str | None:
    """All conditions in one expression: the empty text where there are none, None where one is not known there."""
    written = [translate(flag, place, names) for flag in flags]
    if None in written:
        return None
    parts = list(dict.fromkeys(_plain(str(one)) for one in written))
    several = [f"({one})" if " or " in one or " if " in one else one for one in parts]
    return " and ".join(several if len(several) > 1 else parts)


def _plain(condition: str) -> str:
    node = cst.parse_expression(condition)
    return text(node.with_changes(lpar=[], rpar=[])) if node.lpar and "\n" not in condition else condition


def _scale(
    uses: Uses, flags: list[Flag], policy: str, enabled: str, place: Place, plan: Plan, names: Names, package: str
) -> str | None:
    """What the scaler says that the policy does not: the empty text if nothing; None: not known there."""
    if policy == '"bf16-mixed"':
        plan.note(uses.scaler.call, "bfloat16 needs no loss scale: there is none now")
        return ""
    if any(constant(flag.test) == "False" and not flag.negated for flag in flags):
        return '"none"'
    given = [(name, carry(value, place, names)) for name, value in numbers(uses.scaler, names)]
    condition = conjunction(flags, place, names)
    if condition is None or any(value is None for _, value in given):
        plan.leave(uses.scaler.call, "what the scaler depends on is not known where the model is wrapped")
        return None
    if not policy.startswith('"') and condition.replace("'", '"') and _asks_for_float16(condition):
        condition = ""  # a policy that is not float16 scales nothing by itself
    unconditional = not condition or condition == enabled
    if given:
        scale = f"{package}.LossScale({', '.join(f'{name}={value}' for name, value in given)})"
        return scale if unconditional else f'{scale} if {condition} else "none"'
    return "" if unconditional else f'"dynamic" if {condition} else "none"'


def _asks_for_float16(condition: str) -> bool:
    node = cst.parse_expression(condition)
    if not isinstance(node, cst.Comparison) or len(node.comparisons) != 1:
        return False
    target = node.comparisons[0]
    value = target.comparator
    is_equal = isinstance(target.operator, (cst.Equal, cst.Is))
    return is_equal and (
        constant(value) in ("float16", "fp16", "half") or text(value) in ("torch.float16", "torch.half")
    )
