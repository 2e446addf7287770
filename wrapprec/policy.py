"""What the user wants: a policy, its rules and its loss scale, as data that prints and parses."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from wrapprec import dtypes, grammar
from wrapprec.dtypes import Dtype
from wrapprec.errors import PolicyError, message, nearest
from wrapprec.grammar import Text
from wrapprec.lossscale import LossScale, LossScaling, parse_loss_scale, read_scale, write_scale
from wrapprec.precision import F32, PRESETS, Casting, Precision, find_preset, read_precision, write_precision
from wrapprec.rule import Rule, as_rule, print_rule

__all__ = ["LossScale", "Policy", "Precision", "Rule", "parse_loss_scale", "rule_precision"]

Rounding: TypeAlias = Literal["kahan", "stochastic", "nearest"] | None


@dataclass(frozen=True)
class Policy:
    """What the user wants of a model: dtypes, who casts, rules for parts of it, loss scale and rounding.

    Args:
        param_dtype: what parameters are stored in.
        compute_dtype: what operations run in.
        output_dtype: what the model's floating outputs are cast to.
        casting: `op` (autocast), `module` or None.
        cast_inputs: whether the model's floating inputs are cast; None: only under module casting.
        rules: other precisions for parts of the model; the later one wins on the same module.
        loss_scale: whatever `parse_loss_scale` takes.
        rounding: how low-precision weights keep small updates: `kahan`, `stochastic`, `nearest` or None.
        strict: whether a rule that matches nothing is an error.
        recipe: how fp8 is scaled: `tensorwise` (what None means), `rowwise` or `rowwise_with_gw_hp`.
        grad_dtype: what the gradients of low-precision parameters are kept in; None: as the parameters, or float32
            under a loss scale. Another dtype than the parameters' needs torch 2.10.

    Raises:
        PolicyError: these do not go together.

    >>> str(Policy("f32", "bf16", "f32", "op", rules=(Rule("*.norm", "f32"),)))
    'bf16-mixed; *.norm = float32'
    """

    param_dtype: Dtype
    compute_dtype: Dtype
    output_dtype: Dtype
    casting: Casting = None
    cast_inputs: bool | None = None
    rules: tuple[Rule, ...] = ()
    loss_scale: LossScaling = "auto"
    rounding: Rounding = None
    strict: bool = True
    recipe: str | None = None
    grad_dtype: Dtype | None = None

    def __post_init__(self) -> None:
        precision = self.precision
        for name in ("param_dtype", "compute_dtype", "output_dtype", "recipe"):
            object.__setattr__(self, name, getattr(precision, name))
        object.__setattr__(self, "rules", tuple(as_rule(rule) for rule in self.rules))
        object.__setattr__(self, "loss_scale", parse_loss_scale(self.loss_scale))
        if self.grad_dtype is not None:
            object.__setattr__(self, "grad_dtype", dtypes.parse_dtype(self.grad_dtype))
            if isinstance(self.grad_dtype, str):
                raise PolicyError(
                    message("a torch dtype for gradients", f"grads={self.grad_dtype}", remedy="use grads=float32")
                )
        if self.rounding not in ("kahan", "stochastic", "nearest", None):
            raise PolicyError(
                message(
                    "rounding kahan, stochastic, nearest or none",
                    repr(self.rounding),
                    remedy=nearest(str(self.rounding), ["kahan", "stochastic", "nearest"]) + "write one of these",
                )
            )

    @property
    def precision(self) -> Precision:
        """What a module gets that no rule governs."""
        return Precision(**{f.name: getattr(self, f.name) for f in fields(Precision)})

    @classmethod
    def parse(cls, spec: Policy | int | str | torch.dtype) -> Policy:
        """Read a policy.

        Args:
            spec: a policy, 16, 32 or 64, a torch dtype, a preset's spelling in any case, or text: a preset or
                `params=...,compute=...,output=...`, then `,key=value` and `; select = precision`.

        Returns:
            The policy.

        Raises:
            PolicyError: it cannot be read; the message lists what can, and the nearest match.

        >>> Policy.parse("O1") == Policy.parse(16) == Policy.parse("p=f32,c=f16,o=f32")
        True
        """
        if isinstance(spec, Policy):
            return spec
        if isinstance(spec, bool) or not isinstance(spec, (int, str, torch.dtype)):
            raise PolicyError(
                message(
                    "a policy as text, 16, 32, 64, a torch dtype or a Policy",
                    f"{spec!r} (of type {type(spec).__name__})",
                    remedy="write e.g. 'bf16-mixed'",
                )
            )
        text = grammar.split(str(spec))
        if text.preset is None and not text.fields:
            find_preset(str(spec))
        return _build(text)

    def __str__(self) -> str:
        return "; ".join([_print_head(self), *(" = ".join(print_rule(rule)) for rule in self.rules)])

    def to_toml(self) -> str:
        """Print as TOML: the keys of the grammar, and one `[[rules]]` table a rule.

        Returns:
            The text that `from_toml` reads back.

        >>> print(Policy.parse("16-mixed; *.norm = float32").to_toml())
        preset = "16-mixed"
        <BLANKLINE>
        [[rules]]
        select = "*.norm"
        precision = "float32"
        <BLANKLINE>
        """
        head = _print_head(self)
        items = _write(self) if "=" in head else {"preset": head}
        lines = [f"{key} = {grammar.quote(value)}" for key, value in items.items()]
        for rule in self.rules:
            select, precision = print_rule(rule)
            lines += ["", "[[rules]]", f"select = {grammar.quote(select)}", f"precision = {grammar.quote(precision)}"]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, source: str | Path) -> Policy:
        """Read a policy from TOML.

        Args:
            source: a path, or the text itself.

        Returns:
            The policy.

        Raises:
            PolicyError: it is not TOML, or a key is unknown.

        >>> str(Policy.from_toml('compute = "bf16"'))
        'params=float32,compute=bfloat16'
        """
        table = grammar.read_toml(source)
        preset = table.pop("preset", None)
        rules = tuple(_toml_rule(item) for item in table.pop("rules", ()))
        pairs = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in table.items()]
        preset = None if preset is None else str(preset)
        if preset is None and not pairs:
            raise PolicyError(
                message("a policy in TOML", "nothing but rules", remedy='begin with e.g. preset = "bf16-mixed"')
            )
        return _build(Text(preset, grammar.collect(pairs), rules))


def _toml_rule(item: Any) -> tuple[Any, str]:
    if not isinstance(item, dict) or set(item) != {"select", "precision"}:
        wrong = ", ".join(item) if isinstance(item, dict) else repr(item)
        raise PolicyError(
            message("select and precision in each [[rules]] table", wrong, remedy="write these two keys and no other")
        )
    return grammar.parse_select(str(item["select"])), str(item["precision"])


def _build(text: Text) -> Policy:
    """Make a policy of its split text; the defaults are the preset's, or those of the grammar."""
    precision = read_precision(text.preset, text.fields)
    base = Policy(**{f.name: getattr(precision, f.name) for f in fields(Precision)})
    base = replace(base, **_extras(precision if text.preset is None else PRESETS[find_preset(text.preset)]))
    changes: dict[str, Any] = {"rules": tuple(Rule(select, wanted) for select, wanted in text.rules)}
    if "rounding" in text.fields:
        rounding = text.fields["rounding"].lower()
        changes["rounding"] = None if rounding == "none" else rounding
    if "grads" in text.fields:
        changes["grad_dtype"] = text.fields["grads"]
    strict = grammar.read_flag(text.fields, "strict")
    if strict is not None:
        changes["strict"] = strict
    return replace(base, loss_scale=read_scale(text.fields, base.loss_scale), **changes)


def _extras(precision: Precision) -> dict[str, Any]:
    """The loss scale and rounding that a text leaves out: true half is not scaled, and keeps small updates."""
    return {
        "loss_scale": None if precision.param_dtype == torch.float16 else "auto",
        "rounding": "kahan" if precision.param_dtype in dtypes.LOW else None,
    }


def _write(policy: Policy) -> dict[str, str]:
    """Everything but the rules, as the fields that differ from the grammar's defaults."""
    items = write_precision(policy.precision)
    extras = _extras(policy.precision)
    if policy.loss_scale != extras["loss_scale"]:
        items |= write_scale(policy.loss_scale)
    if policy.rounding != extras["rounding"]:
        items["rounding"] = policy.rounding or "none"
    if policy.grad_dtype is not None:
        items["grads"] = dtypes.name(policy.grad_dtype)
    if not policy.strict:
        items["strict"] = "false"
    return items


def _print_head(policy: Policy) -> str:
    """Everything but the rules: a preset's name where the policy is one, otherwise the grammar."""
    plain = replace(policy, rules=())
    return next((name for name in PRESETS if Policy.parse(name) == plain), None) or grammar.join(_write(policy))


def rule_precision(policy: Policy, rule: Rule) -> Precision:
    """Complete a rule's precision with what the policy says.

    A bare dtype names the compute dtype; float32 and float64 mean a full island of that dtype.

    Args:
        policy: gives parameters, outputs and casting to a bare low-precision dtype.
        rule: one of its rules, or another.

    Returns:
        The precision of the modules that the rule decides.

    >>> rule_precision(Policy.parse("16-mixed"), Rule("head", "bf16"))
    Precision('float32', 'bfloat16', 'float32', casting='op')
    >>> rule_precision(Policy.parse("16-mixed"), Rule("head", "f32"))
    Precision('float32', 'float32', 'float32', casting=None)
    """
    wanted = rule.precision
    if isinstance(wanted, Precision):
        return wanted
    dtype = dtypes.parse_dtype(wanted)
    if not dtypes.is_low(dtype):
        return Precision(dtype, dtype, dtype)
    param = F32 if isinstance(policy.param_dtype, str) else policy.param_dtype
    output = policy.output_dtype if policy.casting else F32
    return Precision(param, dtype, output, policy.casting or "op", policy.cast_inputs)
