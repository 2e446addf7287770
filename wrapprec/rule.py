"""Another precision for some of the modules: what it selects by, and what they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from wrapprec import dtypes, grammar
from wrapprec.errors import PolicyError, message
from wrapprec.precision import PRESETS, Precision, read_precision, write_precision

Select: TypeAlias = str | type | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Rule:
    """Another precision for the modules that `select` matches, and for everything below them.

    Args:
        select: a glob on the qualified name (`*` crosses dots), a Module class, or `callable(name, module) -> bool`.
        precision: a dtype or its name, a `Precision`, a preset or a jmp string; names become what they stand for.

    Raises:
        PolicyError: the precision cannot be read, or the select is of another type.

    >>> Rule("*.norm", "fp32").precision, Rule("head", "bf16-mixed").precision
    (torch.float32, Precision('float32', 'bfloat16', 'float32', casting='op'))
    """

    select: Select
    precision: Precision | torch.dtype | str

    def __post_init__(self) -> None:
        if not (isinstance(self.select, (str, type)) or callable(self.select)):
            raise PolicyError(
                message(
                    "a glob, a Module class or a callable(name, module) as a rule's select",
                    f"{self.select!r} (of type {type(self.select).__name__})",
                    remedy='write e.g. Rule("decoder.*", "float32")',
                )
            )
        object.__setattr__(self, "precision", _read_rule_precision(self.precision))


def _read_rule_precision(value: object) -> Precision | torch.dtype:
    if isinstance(value, Precision):
        return value
    if isinstance(value, (str, torch.dtype)):
        try:
            dtype = dtypes.parse_dtype(value)
        except PolicyError:
            if isinstance(value, torch.dtype):
                raise
        else:
            if not isinstance(dtype, str):
                return dtype
        text = grammar.split(str(value))
        if not text.rules and set(text.fields) <= {"params", "compute", "output", "casting", "cast_inputs", "recipe"}:
            return read_precision(text.preset, text.fields)
    raise PolicyError(
        message(
            "a rule's precision: a dtype, a Precision, a preset or params=...,compute=...,output=...",
            f"{value!r} (of type {type(value).__name__})",
            remedy="write e.g. 'float32'; loss_scale, rounding and strict belong to the policy",
        )
    )


def print_rule(rule: Rule) -> tuple[str, str]:
    """Print a rule's two sides.

    Args:
        rule: the rule.

    Returns:
        The select and the precision as text.

    >>> print_rule(Rule("*.norm", "fp32"))
    ('*.norm', 'float32')
    """
    wanted = rule.precision
    if not isinstance(wanted, Precision):
        return grammar.print_select(rule.select), dtypes.name(wanted)
    preset = next((name for name, precision in PRESETS.items() if precision == wanted), None)
    return grammar.print_select(rule.select), preset or grammar.join(write_precision(wanted))


def as_rule(item: Any) -> Rule:
    """Accept a rule or a `(select, precision)` pair.

    Args:
        item: either.

    Returns:
        The rule.

    Raises:
        PolicyError: it is something else.

    >>> as_rule(("*.norm", "f32")) == Rule("*.norm", "f32")
    True
    """
    if isinstance(item, Rule):
        return item
    if isinstance(item, tuple) and len(item) == 2:
        return Rule(*item)
    raise PolicyError(
        message(
            "a Rule, or a (select, precision) pair",
            f"{item!r} (of type {type(item).__name__})",
            remedy='write e.g. Rule("decoder.*", "float32")',
        )
    )
