"""Model + policy + device -> plan: reads the model and changes nothing."""

from __future__ import annotations

import enum
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from wrapprec import dtypes, fits
from wrapprec.allowlist import FOURIER, NORM, STRICTLY, is_torch_norm, is_torch_own
from wrapprec.backends.base import Backend
from wrapprec.backends.select import auto_policy, backend_for, device_of
from wrapprec.defaults import Decision, Keeper, cannot, copies_weights, default, notes
from wrapprec.errors import PolicyError, WrapprecWarning, message, module_label, nearest
from wrapprec.grammar import print_select
from wrapprec.lossscale import LossScale, LossScaling, parse_loss_scale
from wrapprec.lowbit.quantisable import elements, missed, settle, stored_form, stored_shape
from wrapprec.memory import Weight
from wrapprec.placement import Activations, Placement, Plan
from wrapprec.policy import Policy, rule_precision
from wrapprec.precision import Precision
from wrapprec.rule import Rule, as_rule

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
    placements = tuple(_Walk(model, chosen, backend, where).placements())
    scale = _decide_scale(chosen.loss_scale, placements, backend)
    asked = {chosen.precision, *(rule_precision(chosen, rule) for rule in chosen.rules)}
    advice = {backend.advise(precision, where) for precision in asked}
    facts = {backend.facts(precision, where) for precision in asked}
    if any(precision.compute_dtype == "fp8" for precision in map(backend.native, asked)):
        advice.add(fits.missed(dict(model.named_modules()), placements))
    advice.add(missed(any(precision.param_dtype in dtypes.WEIGHT_FORMATS for precision in asked), placements))
    said = (tuple(sorted(text for text in texts if text)) for texts in (advice, facts))
    return Plan(chosen, str(where), placements, scale, why, *said)


class _Visit(NamedTuple):
    name: str
    module: nn.Module
    parent: int


@dataclass(frozen=True)
class _Matcher:
    """A rule made ready to be asked about thousands of modules."""

    text: str
    precision: Precision
    matches: Callable[[str, nn.Module], object]

    @classmethod
    def of(cls, number: int, rule: Rule, policy: Policy, backend: Backend) -> _Matcher:
        select, precision = rule.select, backend.native(rule_precision(policy, rule))
        if isinstance(select, str):
            found = re.compile(fnmatch.translate(select)).match
            return cls(f'rule {number}: "{select}"', precision, lambda name, module: found(name))
        text = f"rule {number}: {print_select(select)}"
        if isinstance(select, type):
            kind = select
            return cls(text, precision, lambda name, module: isinstance(module, kind))
        return cls(text, precision, select)


class _Walk:
    """One walk over a model: every name once, parents before children."""

    def __init__(self, model: nn.Module, policy: Policy, backend: Backend, device: torch.device) -> None:
        self.policy, self.backend, self.device = policy, backend, device
        self.visits = list(_visit(model))
        # The parameters met so far, by id, and those of which a copy is lent: tied ones come again.
        self.counted: set[int] = set()
        self.copied: set[int] = set()
        self.matchers = [_Matcher.of(i, rule, policy, backend) for i, rule in enumerate(policy.rules, 1)]
        self.ends = fits.ends({id(visit.module): visit.module for visit in self.visits}.values())
        self.base = Decision(backend.native(policy.precision), "policy", f"policy {replace(policy, rules=())}")

    def placements(self) -> Iterator[Placement]:
        decisions = self._decide()
        settled = settle([(visit.name, visit.module) for visit in self.visits], decisions)
        regions: list[Precision] = []
        first: dict[int, int] = {}
        for index, (visit, decision) in enumerate(zip(self.visits, decisions, strict=True)):
            around = regions[visit.parent] if visit.parent >= 0 else self.base.precision.surroundings
            activations: Activations = "cast"
            reason = decision.reason
            if visit.parent < 0 or decision is not decisions[visit.parent]:
                activations, reason = self._treat(visit.module, decision, around)
            region = around if activations == "keep" else decision.precision.surroundings
            regions.append(region)
            if id(visit.module) in first:
                self._check_shared(first[id(visit.module)], index, decisions)
                continue
            first[id(visit.module)] = index
            yield Placement(
                name=visit.name,
                module_type=type(visit.module).__name__,
                precision=settled[index][0],
                rule=decision.rule,
                reason=reason,
                is_root=visit.parent < 0 or region != around,
                activations=activations,
                params=sum(elements(p) for p in visit.module._parameters.values() if p is not None and not is_lazy(p)),
                notes=settled[index][1] + notes(visit.module, decision.precision, self.backend, self.device),
                weights=tuple(self._weights(visit.module, settled[index][0])),
            )

    def _weights(self, module: nn.Module, precision: Precision) -> Iterator[Weight]:
        """A module's own parameters, as they will be stored."""
        copied = copies_weights(module, precision)
        for name, param in module._parameters.items():
            if param is None or is_lazy(param):
                continue
            form = stored_form(name, precision)
            lent = precision.activation_dtype if copied and form is None and id(param) not in self.copied else None
            tied = id(param) in self.counted
            trained = param.requires_grad and form is None
            yield Weight(name, stored_shape(module, param), form or param.dtype, trained, lent, tied)
            self.counted.add(id(param))
            if lent is not None:
                self.copied.add(id(param))

    def _decide(self) -> list[Decision]:
        """For every visit, the last rule that matches it, or else what governs its parent."""
        used: set[int] = set()
        decisions: list[Decision] = []
        # What governs the children: as the module itself, unless a default means its own code only.
        below: list[Decision] = []
        keepers: list[tuple[Keeper, ...]] = []
        for visit in self.visits:
            above = below[visit.parent] if visit.parent >= 0 else self.base
            kept = keepers[visit.parent] if visit.parent >= 0 else ()
            keeper = Keeper.of(visit.name, visit.module)
            keepers.append((*kept, keeper) if keeper else kept)
            decision = above
            if dtypes.is_low(above.precision.compute_dtype):
                decision = (
                    default(visit.name, visit.module, keepers[-1])
                    or cannot(visit.module, above.precision.surroundings, self.backend, self.device)
                    or fits.default(visit.module, above.precision, self.ends, self.backend, self.device)
                    or above
                )
            for index, matcher in enumerate(self.matchers):
                if matcher.matches(visit.name, visit.module):
                    used.add(index)
                    decision = Decision(matcher.precision, matcher.text, f'matched at "{visit.name}"')
            decisions.append(fits.settle(visit.module, decision))
            below.append(above if decision.own else decision)
        for index in range(len(self.matchers)):
            if index not in used:
                self._report_unused(index)
        return decisions

    def _report_unused(self, index: int) -> None:
        select = self.policy.rules[index].select
        names = {visit.name for visit in self.visits} | {type(visit.module).__name__ for visit in self.visits}
        written = select if isinstance(select, str) else getattr(select, "__name__", "")
        text = message(
            "every rule to match a module",
            f"{self.matchers[index].text}, which matches none of {len(self.visits)}",
            remedy=nearest(written, names) + "correct the rule, drop it, or set strict=False on the policy",
        )
        if self.policy.strict:
            raise PolicyError(text)
        warnings.warn(text, WrapprecWarning, stacklevel=2)

    def _treat(self, module: nn.Module, decision: Decision, around: Precision) -> tuple[Activations, str]:
        """What happens to the activations of a module, and the reason to show."""
        if decision.own and dtypes.is_low(around.compute_dtype):
            return "restore", decision.reason
        if decision.rule.endswith(STRICTLY) and around.casting == "module" and not is_torch_own(module):
            return "given", f"{decision.reason}; its own code casts"
        if decision.rule.endswith(FOURIER) and decision.is_default and dtypes.is_low(around.compute_dtype):
            return "restore", f"{decision.reason}; torch has no such transform in low precision on every device"
        if not (decision.is_default and decision.rule.endswith(NORM)) or not dtypes.is_low(around.compute_dtype):
            return "cast", decision.reason
        dtype = around.activation_dtype
        own = is_torch_norm(module)
        if own and self.backend.accepts_mixed_norm(module, dtype, self.device):
            kept = f"activations stay {dtypes.name(dtype)}: kernel probed"
            return "keep", f"parameters, statistics and accumulation in float32; {kept}"
        why = "its kernel does not take the mix" if own else "not one of torch's own classes"
        return "restore", f"activations go to float32 and back to {dtypes.name(dtype)}: {why}"

    def _check_shared(self, first: int, again: int, decisions: list[Decision]) -> None:
        one, other = decisions[first], decisions[again]
        if one.precision == other.precision:
            return
        names = self.visits[first].name, self.visits[again].name
        raise PolicyError(
            message(
                "one precision for a module that has two names",
                f'{one.precision} as "{names[0]}" ({one.rule}), {other.precision} as "{names[1]}" ({other.rule})',
                where=module_label(names[0], self.visits[first].module),
                remedy=f'add a rule for both names: "{names[0]}" and "{names[1]}"',
            )
        )


def _visit(model: nn.Module) -> Iterator[_Visit]:
    """Every module under every one of its names, depth first; a module below itself is not entered again."""
    count = 0
    todo: list[tuple[str, nn.Module, int, tuple[int, ...]]] = [("", model, -1, ())]
    while todo:
        name, module, parent, path = todo.pop()
        if id(module) in path:
            continue
        yield _Visit(name, module, parent)
        path = (*path, id(module))
        prefix = f"{name}." if name else ""
        children = [(prefix + key, child, count, path) for key, child in module._modules.items() if child is not None]
        todo.extend(reversed(children))
        count += 1


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
