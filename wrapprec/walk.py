"""One walk over a model: which rule governs each module, and what becomes of its activations and weights."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from wrapprec import dtypes, fits
from wrapprec.allowlist import FOURIER, NORM, STRICTLY, is_torch_norm, is_torch_own
from wrapprec.backends.base import Backend
from wrapprec.defaults import (
    Decision,
    Keeper,
    cannot,
    copies_weights,
    default,
    keeps_weights,
    notes,
    within_parametrisations,
)
from wrapprec.errors import PolicyError, WrapprecWarning, message, module_label, nearest
from wrapprec.grammar import print_select
from wrapprec.hooked import made_by_hooks
from wrapprec.lowbit.quantisable import elements, settle, stored_form, stored_shape
from wrapprec.memory import Weight
from wrapprec.placement import Activations, Placement
from wrapprec.policy import Policy, rule_precision
from wrapprec.precision import Precision
from wrapprec.rule import Rule


class Visit(NamedTuple):
    name: str
    module: nn.Module
    parent: int


@dataclass(frozen=True)
class Matcher:
    """A rule made ready to be asked about thousands of modules."""

    text: str
    precision: Precision
    matches: Callable[[str, nn.Module], object]

    @classmethod
    def of(cls, number: int, rule: Rule, policy: Policy, backend: Backend) -> Matcher:
        select, precision = rule.select, backend.native(rule_precision(policy, rule))
        if isinstance(select, str):
            found = re.compile(fnmatch.translate(select)).match
            return cls(f'rule {number}: "{select}"', precision, lambda name, module: found(name))
        text = f"rule {number}: {print_select(select)}"
        if isinstance(select, type):
            kind = select
            return cls(text, precision, lambda name, module: isinstance(module, kind))
        return cls(text, precision, select)


class Walk:
    """One walk over a model: every name once, parents before children."""

    def __init__(self, model: nn.Module, policy: Policy, backend: Backend, device: torch.device) -> None:
        self.policy, self.backend, self.device = policy, backend, device
        self.visits = list(_visit(model))
        # The parameters met so far, by id, and those of which a copy is lent: tied ones come again.
        self.counted: set[int] = set()
        self.copied: set[int] = set()
        self.stored: dict[int, torch.dtype] = {}
        self.matchers = [Matcher.of(i, rule, policy, backend) for i, rule in enumerate(policy.rules, 1)]
        self.ends = fits.ends({id(visit.module): visit.module for visit in self.visits}.values())
        self.base = Decision(backend.native(policy.precision), "policy", f"policy {replace(policy, rules=())}")

    def placements(self) -> Iterator[Placement]:
        decisions = self._decide()
        self._store(decisions)
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

    def _store(self, decisions: list[Decision]) -> None:
        """Find what each parameter will be stored in: the widest that its modules want."""
        everywhere = self.policy.param_dtype in dtypes.REAL - {torch.float32}
        parametrised = within_parametrisations(self.visits[0].module)
        for visit, decision in zip(self.visits, decisions, strict=True):
            wanted = decision.precision.param_dtype
            made_of = made_by_hooks(visit.module, visit.module._parameters)
            for key, param in visit.module._parameters.items():
                if param is None or param.dtype not in dtypes.REAL:
                    continue
                dtype = wanted
                if isinstance(wanted, str) or (wanted is torch.float32 and not everywhere):
                    dtype = param.dtype
                elif wanted in dtypes.LOW and (key in made_of or keeps_weights(visit.module, parametrised)):
                    dtype = torch.promote_types(torch.float32, param.dtype)
                assert isinstance(dtype, torch.dtype)
                self.stored[id(param)] = torch.promote_types(self.stored.get(id(param), dtype), dtype)

    def _weights(self, module: nn.Module, precision: Precision) -> Iterator[Weight]:
        """A module's own parameters, as they will be stored."""
        copied = copies_weights(module, precision)
        for name, param in module._parameters.items():
            if param is None or is_lazy(param):
                continue
            form = stored_form(name, precision)
            dtype = form or self.stored.get(id(param), param.dtype)
            low = precision.activation_dtype
            lent = low if copied and form is None and dtype != low and id(param) not in self.copied else None
            tied = id(param) in self.counted
            trained = param.requires_grad and form is None
            embeds = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            yield Weight(name, stored_shape(module, param), dtype, trained, lent, tied, embeds)
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


def _visit(model: nn.Module) -> Iterator[Visit]:
    """Every module under every one of its names, depth first; a module below itself is not entered again."""
    count = 0
    todo: list[tuple[str, nn.Module, int, tuple[int, ...]]] = [("", model, -1, ())]
    while todo:
        name, module, parent, path = todo.pop()
        if id(module) in path:
            continue
        yield Visit(name, module, parent)
        path = (*path, id(module))
        prefix = f"{name}." if name else ""
        children = [(prefix + key, child, count, path) for key, child in module._modules.items() if child is not None]
        todo.extend(reversed(children))
        count += 1
