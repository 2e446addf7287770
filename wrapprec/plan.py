"""Model + policy + device -> plan: reads the model and changes nothing."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from wrapprec import dtypes, fits
from wrapprec.backends.base import Backend
from wrapprec.backends.select import auto_policy, backend_for, device_of
from wrapprec.errors import PolicyError, message
from wrapprec.lossscale import LossScale, LossScaling, parse_loss_scale
from wrapprec.lowbit.quantisable import missed
from wrapprec.placement import Placement, Plan
from wrapprec.policy import Policy, rule_precision
from wrapprec.rule import Rule, as_rule
from wrapprec.walk import Walk

__all__ = ["UNSET", "Placement", "Plan", "resolve"]


class _Unset(enum.Enum):
    UNSET = enum.auto()


UNSET: Final = _Unset.UNSET
"""Stands for a loss scale that was not given, since None means none."""


def resolve(
    model: nn.Module,
    policy: Policy | int | str | torch.dtype = "auto",
    *,
    rules: Iterable[Rule | tuple[Any, Any]] = (),
    device: torch.device | str | None = None,
    loss_scale: object = UNSET,
) -> Plan:
    """Decide what every module of a model gets, without touching it.

    The default float32 modules come first, then the policy's rules, then `rules`. A rule governs the subtree below
    what it matches: the deepest matched module decides, and on the same module the last rule. The defaults apply
    only where the surroundings compute in low precision.

    Args:
        model: any module on a real device.
        policy: whatever `Policy.parse` takes, or `auto`.
        rules: further rules, or `(select, precision)` pairs.
        device: where to plan for; None is the device of the first parameter or buffer.
        loss_scale: whatever `parse_loss_scale` takes; left out, the policy's.

    Returns:
        The plan.

    Raises:
        PolicyError: the policy cannot be read, a rule matches nothing (under a strict policy) or says two things of
            one shared module, the model is on the meta device, or a scale would meet float16 outputs.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    >>> plan = resolve(model, "bf16-mixed")
    >>> plan.placement("0").precision.compute_dtype, plan.placement("1").rule
    (torch.bfloat16, 'default: normalisation')
    """
    where = torch.device(device) if device is not None else device_of(model)
    backend = backend_for(where)
    if isinstance(policy, str) and policy.strip().lower() == "auto":
        chosen, why = auto_policy(where)
    else:
        chosen, why = Policy.parse(policy), ""
    chosen = replace(chosen, rules=chosen.rules + tuple(as_rule(rule) for rule in rules))
    if loss_scale is not UNSET:
        chosen = replace(chosen, loss_scale=parse_loss_scale(loss_scale))
    placements = tuple(Walk(model, chosen, backend, where).placements())
    scale = _decide_scale(chosen.loss_scale, placements, backend)
    asked = {chosen.precision, *(rule_precision(chosen, rule) for rule in chosen.rules)}
    advice = {backend.advise(precision, where) for precision in asked}
    facts = {backend.facts(precision, where) for precision in asked}
    native = [backend.native(precision) for precision in asked]
    if any(precision.compute_dtype == "fp8" for precision in native):
        advice.add(fits.missed(dict(model.named_modules()), placements))
    advice.add(missed(any(precision.param_dtype in dtypes.WEIGHT_FORMATS for precision in native), placements))
    said = (tuple(sorted(text for text in texts if text)) for texts in (advice, facts))
    return Plan(chosen, str(where), placements, scale, why, *said)


def _decide_scale(wanted: LossScaling, placements: tuple[Placement, ...], backend: Backend) -> LossScale | None:
    """Scale where asked to, or by itself where something computes in float16; refuse float16 outputs then."""
    half = any(p.precision.compute_dtype == torch.float16 for p in placements)
    scale = wanted if isinstance(wanted, LossScale) else LossScale() if wanted and half else None
    if scale is None or not backend.scaling:
        return None
    for p in placements:
        if p.precision.casting is not None and p.precision.output_dtype == torch.float16:
            raise PolicyError(
                message(
                    "float32 or bfloat16 outputs under a loss scale",
                    "output=float16, in which scaled gradients underflow before they are unscaled",
                    where=f'"{p.name}" ({p.module_type}), by {p.rule}',
                    remedy="use output=float32, or loss_scale=none",
                )
            )
    return scale
