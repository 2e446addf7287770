"""What will happen to a model, as data: a plan and its placements, which compare, print and serialise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from torch.optim import Optimizer

from wrapprec import dtypes
from wrapprec.errors import PolicyError, message, nearest
from wrapprec.footprint import state_of
from wrapprec.lossscale import LossScale, read_scale, write_scale
from wrapprec.memory import Held, Memory, Weight, count, spread
from wrapprec.policy import Policy
from wrapprec.precision import Precision, read_precision, write_precision

Activations: TypeAlias = Literal["cast", "keep", "restore", "given"]
_TREATED = {"keep": ("activations kept",), "restore": ("activations restored",), "given": ("activations as given",)}


@dataclass(frozen=True)
class Placement:
    """What a module gets, and why.

    Args:
        name: its qualified name; the first one where it is shared.
        module_type: its class name.
        precision: its dtypes.
        rule: which rule decided, such as `rule 2: "decoder.*"`, `default: normalisation` or `policy`.
        reason: the same in words.
        is_root: whether a region of another precision than its parent's begins here; true for the model itself.
        activations: `cast` to the precision; `keep`: a norm whose kernel takes what comes; `restore`: a norm that
            computes in float32 and gives back the surrounding dtype; `given`: a module whose own code casts, since it
            was written for float32 weights among low precision activations.
        params: how many elements its own parameters have.
        notes: what else a reader should know.
        weights: its own parameters, as they will be stored.

    >>> f32 = Precision("f32", "f32", "f32")
    >>> Placement("fc", "Linear", f32, "policy", "policy 32-true", False).activations
    'cast'
    """

    name: str
    module_type: str
    precision: Precision
    rule: str
    reason: str
    is_root: bool
    activations: Activations = "cast"
    params: int = 0
    notes: tuple[str, ...] = ()
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What `wrap` will do to a model on a device.

    Args:
        policy: what was asked for, with all rules.
        device: the device's name.
        placements: one a module, in the order of `named_modules`.
        loss_scale: decided: None is no scaling.
        reason: why `auto` chose this policy; empty where the user named one.
        notes: advice that concerns the whole model; `wrap` warns of each once.
        facts: what else was measured on the device.

    >>> print(Plan(Policy.parse(32), "cpu", ()))
    policy      32-true
    device      cpu
    loss scale  none
    """

    policy: Policy
    device: str
    placements: tuple[Placement, ...]
    loss_scale: LossScale | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    @functools.cached_property
    def rounding(self) -> str | None:
        """How weights are rounded: as the policy says; where only rules store them in low precision, by `kahan`."""
        if self.policy.rounding is not None or self.policy.param_dtype in dtypes.LOW:
            return self.policy.rounding
        return "kahan" if any(p.precision.param_dtype in dtypes.LOW for p in self.placements) else None

    @property
    def grad_dtype(self) -> torch.dtype | None:
        """What gradients of low precision weights are kept in; None: as the weights."""
        wanted = self.policy.grad_dtype
        # True gradients are smaller than float16 reaches.
        scaled = torch.float32 if self.loss_scale is not None and hasattr(torch.Tensor, "grad_dtype") else None
        return scaled if wanted is None or isinstance(wanted, str) else wanted

    def _held(self, placement: Placement, state: Callable[[Weight], float]) -> Held:
        master = 2 if self.rounding == "kahan" else 0  # a remainder of 16 bits
        return count(placement.weights, state, master, self.grad_dtype)

    @functools.cached_property
    def _by_name(self) -> dict[str, Placement]:
        return {placement.name: placement for placement in self.placements}

    def placement(self, name: str) -> Placement:
        """Look a module up.

        Args:
            name: its qualified name; the empty string is the model itself.

        Returns:
            Its placement.

        Raises:
            PolicyError: no module has this name.

        >>> f32 = Precision("f32", "f32", "f32")
        >>> Plan(Policy.parse(32), "cpu", (Placement("", "Linear", f32, "policy", "", True),)).placement("").rule
        'policy'
        """
        found = self.placement_or_none(name)
        if found is None:
            raise PolicyError(
                message(
                    "the qualified name of a module in the plan",
                    repr(name),
                    remedy=nearest(name, self._by_name) + "print the plan to see every name",
                )
            )
        return found

    def placement_or_none(self, name: str) -> Placement | None:
        """The placement of the module of this qualified name, if there is one."""
        return self._by_name.get(name)

    def memory(
        self,
        optimizer: Optimizer | type[Optimizer] | str | Sequence[Optimizer] = "AdamW",
        *,
        optimizer_bits: int | None = None,
        replicas: int = 1,
        shards: int = 1,
    ) -> Memory:
        """Predict what parameters take on each device: held, by kind, and sent in a step.

        Args:
            optimizer: an optimizer, its class, or the name of one of torch's; or several; they are not touched.
            optimizer_bits: as for `wrap`.
            replicas: how many copies of the model are trained together (DistributedDataParallel, or the outer
                dimension of a hybrid mesh).
            shards: over how many devices each copy is spread (FSDP2).

        Returns:
            Bytes; with `module`, `params` and bytes for each parameter when printed. Activations are not counted.

        Raises:
            PolicyError: the optimizer's state cannot be foreseen, or has no form with so few bits, or a number is not
                positive.

        >>> import torch, wrapprec
        >>> print(wrapprec.resolve(torch.nn.Linear(99, 10), "bf16-mixed").memory())
        module   params  weights  grads  state  master  B/param
        (model)   1,000     4.00   4.00   8.00    0.00    16.00
        all       1,000     4.00   4.00   8.00    0.00    16.00
        <BLANKLINE>
        total 16 kB: weights 4 kB, gradients 4 kB, state 8 kB, lent 2 kB
        """
        for name, number in (("replicas", replicas), ("shards", shards)):
            if not isinstance(number, int) or number < 1:
                raise PolicyError(message(f"a positive number of {name}", f"{number!r}", remedy="1 is a single device"))
        packed = [repr(p.name) for p in self.placements for w in p.weights if isinstance(w.dtype, str)]
        if packed and shards > 1:
            received = f"quantised ones, and shards={shards}"
            remedy = "leave shards out: every device holds all of them"
            expected = "weights of torch's dtypes, to be spread over several devices"
            raise PolicyError(message(expected, received, where=packed[0], remedy=remedy))
        measure, rounds = state_of(optimizer, optimizer_bits), self.rounding is not None

        def state(weight: Weight) -> float:
            # An optimizer is shown low precision weights as float32 ones where they are rounded by us.
            shown = torch.float32 if rounds and weight.dtype in dtypes.LOW else weight.dtype
            assert isinstance(shown, torch.dtype), "only what torch has a dtype for is trained"
            return measure(weight.shape, shown, weight.embeds)

        held = tuple((p.name, self._held(p, state)) for p in self.placements if p.weights)
        kinds = [(placement.name, placement.module_type) for placement in self.placements]
        return spread(held, kinds, self.policy.precision, replicas, shards)

    def __str__(self) -> str:
        scale = write_scale(self.loss_scale)
        kind = scale.pop("loss_scale")
        values = {"init_scale": f"{self.loss_scale.init_scale:g}"} if self.loss_scale and kind == "dynamic" else {}
        settings = ", ".join(f"{key}={value}" for key, value in (values | scale).items())
        lines = [
            f"policy      {self.policy}" + (f"  (auto: {self.reason})" if self.reason else ""),
            f"device      {self.device}",
            f"loss scale  {kind}" + (f" ({settings})" if settings else ""),
            *(f"note        {note}" for note in self.notes),
            *(f"measured    {fact}" for fact in self.facts),
        ]
        return "\n".join(
            [*lines, "", *_table(self.placements, [self._held(p, lambda weight: 0.0) for p in self.placements])]
            if self.placements
            else lines
        )

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain data that JSON can hold; the policy and its rules as text.

        Returns:
            What `from_dict` takes.

        >>> Plan(Policy.parse(32), "cpu", ()).to_dict()["policy"]
        '32-true'
        """
        placements = []
        for placement in self.placements:
            row = {f.name: getattr(placement, f.name) for f in fields(placement)}
            plain = {"notes": list(placement.notes), "weights": [weight.to_dict() for weight in placement.weights]}
            placements.append(row | {"precision": write_precision(placement.precision)} | plain)
        return {
            "policy": str(self.policy),
            "device": self.device,
            "placements": placements,
            "loss_scale": write_scale(self.loss_scale),
            "reason": self.reason,
            "notes": list(self.notes),
            "facts": list(self.facts),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_dict` gave.

        Args:
            data: the plain data.

        Returns:
            An equal plan.

        Raises:
            PolicyError: the policy cannot be read, for example because a rule selects by a lambda.

        >>> plan = Plan(Policy.parse("16-mixed"), "cpu", (), LossScale())
        >>> Plan.from_dict(plan.to_dict()) == plan
        True
        """
        placements = tuple(
            Placement(
                **{
                    **row,
                    "precision": read_precision(None, row["precision"]),
                    "notes": tuple(row["notes"]),
                    "weights": tuple(Weight.from_dict(weight) for weight in row.get("weights", ())),
                }
            )
            for row in data["placements"]
        )
        scale = read_scale(data["loss_scale"], None)
        return cls(
            policy=Policy.parse(data["policy"]),
            device=data["device"],
            placements=placements,
            loss_scale=scale if isinstance(scale, LossScale) else None,
            reason=data["reason"],
            notes=tuple(data["notes"]),
            facts=tuple(data.get("facts", ())),
        )


def _table(placements: tuple[Placement, ...], held: list[Held]) -> list[str]:
    """Lay the placements out in columns as wide as their longest entry; numbers stand right.

    Bytes per parameter have columns where they are not 4 for each weight and its gradient.
    """
    with_bytes = any((h.weights, h.gradients, h.master) != (4 * h.elements, 4 * h.elements, 0) for h in held)
    bytes_of = ("weights B", "grads B", "master B") if with_bytes else ()
    rows = [("module", "class", "params", *bytes_of, "param", "compute", "output", "decided by")]
    for p, h in zip(placements, held, strict=True):
        names = (dtypes.name(d) for d in (p.precision.param_dtype, p.precision.compute_dtype, p.precision.output_dtype))
        decided = "; ".join([p.rule, *_TREATED.get(p.activations, ()), *p.notes])
        each = (f"{size / h.elements:.3g}" if h.elements else "-" for size in (h.weights, h.gradients, h.master))
        rows.append(
            (p.name or "(model)", p.module_type, f"{p.params:,}", *list(each)[: len(bytes_of)], *names, decided)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for column in range(2, 3 + len(bytes_of)):
            cells[column] = row[column].rjust(widths[column])
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
