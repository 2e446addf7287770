"""How many bytes a plan's parameters take: held, by kind, and sent, on one device or on many."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from wrapprec.dtypes import Dtype, is_low, name, parse_dtype
from wrapprec.lowbit.sizes import stored_bytes
from wrapprec.precision import Precision

REDUCED = torch.float32
"""What FSDP2 reduces gradients in, by `wrapprec.fsdp_policy`."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter, as a plan knows it.

    Args:
        name: in its module.
        shape: of all of it, also where it is sharded.
        dtype: what it is stored in under the plan: a torch dtype or a weight format.
        trained: it requires grad.
        lent: the low precision dtype of a copy that a step holds until backward; None for no copy of its own.
        tied: it was counted at an earlier module.
        embeds: it is an embedding's, whose optimizer state stays in 32 bits.

    >>> Weight("weight", (4, 2), torch.float32, True).elements
    8
    """

    name: str
    shape: Shape
    dtype: Dtype
    trained: bool
    lent: torch.dtype | None = None
    tied: bool = False
    embeds: bool = False

    def gradient(self, low: torch.dtype | None) -> int:
        """Bytes of its `.grad`, which `low` is the dtype of where the weight's is low precision; None: as the weight.

        >>> weight = Weight("w", (2,), torch.bfloat16, trained=True)
        >>> weight.gradient(None), weight.gradient(torch.float32)
        (4, 8)
        """
        if not self.trained or isinstance(self.dtype, str):
            return 0
        return self.elements * (low if low is not None and is_low(self.dtype) else self.dtype).itemsize

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def stored(self) -> float:
        """Bytes it is stored in."""
        if isinstance(self.dtype, str):
            return float(stored_bytes(self.dtype, self.shape))
        return float(self.elements * self.dtype.itemsize)

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain data that JSON can hold.

        >>> Weight.from_dict(Weight("w", (2,), torch.float32, True).to_dict()).name
        'w'
        """
        lent = None if self.lent is None else name(self.lent)
        return {**vars(self), "shape": list(self.shape), "dtype": name(self.dtype), "lent": lent}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Weight:
        """Read what `to_dict` gave."""
        lent = None if data["lent"] is None else parse_dtype(data["lent"])
        assert not isinstance(lent, str)
        return cls(**{**data, "shape": tuple(data["shape"]), "dtype": parse_dtype(data["dtype"]), "lent": lent})


@dataclass(frozen=True)
class Held:
    """Bytes of one module, or of all.

    Args:
        elements: parameters, tied ones once.
        trained: those of them that require grad.
        weights: what the parameters are stored in.
        gradients: `.grad` of those that require grad.
        state: the optimizer's.
        master: what is kept beside low precision weights so that small updates are not lost.
        lent: low precision copies that a step holds from forward to backward; activations are not counted.

    >>> Held(1, 1, 4.0, 4.0, 8.0, 0.0, 2.0).total
    16.0
    """

    elements: int
    trained: int
    weights: float
    gradients: float
    state: float
    master: float
    lent: float

    @property
    def total(self) -> float:
        """Bytes between two steps, when nothing is lent."""
        return self.weights + self.gradients + self.state + self.master


@dataclass(frozen=True)
class Memory(Held):
    """Bytes that one device holds, and sends in one step, for the parameters of a model.

    Args:
        sent: bytes a device sends in a step of one backward, by collectives that go round a ring: 2 (n-1)/n of its
            input for an all-reduce among n, (n-1)/n of the whole for an all-gather or a reduce-scatter.
        modules: what each module that has parameters holds, by qualified name, before any sharding.
    """

    sent: float = 0.0
    modules: tuple[tuple[str, Held], ...] = ()

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("module", "params", "weights", "grads", "state", "master", "B/param")]
        shown = [*self.modules, ("all on one device" if self.sent else "all", self)]
        for fqn, held in shown:
            values = (held.weights, held.gradients, held.state, held.master, held.total)
            per = [f"{value / held.elements:.2f}" if held.elements else "-" for value in values]
            rows.append((fqn or "(model)", f"{held.elements:,}", *per))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        kinds = ("weights", "gradients", "state", "master", "lent", "sent")
        sizes = ", ".join(f"{kind} {_size(getattr(self, kind))}" for kind in kinds if getattr(self, kind))
        return "\n".join([*lines, "", f"total {_size(self.total)}: {sizes}"])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.4g} {unit}"


def count(
    weights: Iterable[Weight], state: Callable[[Weight], float], master: int, grad_dtype: torch.dtype | None = None
) -> Held:
    """Add up what weights take.

    Args:
        weights: tied ones count where they come first.
        state: bytes of the optimizer's state for a weight.
        master: bytes kept beside each element that is trained in low precision.
        grad_dtype: of the gradients of low precision weights; None: as the weights.

    Returns:
        The bytes.

    >>> count([Weight("w", (10,), torch.float32, True)], lambda weight: 80.0, 2).total
    160.0
    """
    weights = tuple(weights)
    own = [weight for weight in weights if not weight.tied]
    trained = [weight for weight in own if weight.trained]
    return Held(
        elements=sum(weight.elements for weight in own),
        trained=sum(weight.elements for weight in trained),
        weights=sum(weight.stored for weight in own),
        gradients=float(sum(weight.gradient(grad_dtype) for weight in trained)),
        state=float(sum(state(weight) for weight in trained)),
        master=float(sum(weight.elements * master for weight in trained if is_low(weight.dtype))),
        lent=float(sum(weight.elements * weight.lent.itemsize for weight in weights if weight.lent is not None)),
    )


def spread(
    modules: Sequence[tuple[str, Held]],
    kinds: Sequence[tuple[str, str]],
    precision: Precision,
    replicas: int,
    shards: int,
) -> Memory:
    """Divide what a model holds among devices, and count what they send each other in a step.

    Sharded (FSDP2), each device holds its part of weights, gradients and state, and, while a step runs, whole weights
    of what is in no block (kept from forward to backward) and of two blocks, the one that computes and the next.
    Gradients are reduced in float32.

    Args:
        modules: by qualified name, what each holds unsharded.
        kinds: `(qualified name, class name)` of every module: blocks are what a ModuleList holds directly.
        precision: of the policy.
        replicas: how many copies of the model there are.
        shards: over how many devices each is spread.

    Returns:
        What one device holds and sends.
    """
    whole = Held(*(sum(getattr(held, f.name) for _, held in modules) for f in fields(Held)))
    if shards == 1:
        sent = ring("all_reduce", whole.gradients, replicas)
        return Memory(**vars(whole), sent=sent, modules=tuple(modules))
    low = precision.casting is not None and precision.param_dtype == torch.float32
    gathered = precision.activation_dtype if low else precision.surroundings.param_dtype
    assert isinstance(gathered, torch.dtype)
    home, sizes = blocks(kinds), Counter[str]()
    for fqn, held in modules:
        sizes[home.get(fqn, "")] += held.elements
    outside = sizes.pop("", 0)
    reduced = whole.trained * REDUCED.itemsize
    # Blocks are gathered for forward and again for backward.
    sent = ring("all_gather", (outside + 2 * sizes.total()) * gathered.itemsize, shards)
    sent += ring("reduce_scatter", reduced, shards) + ring("all_reduce", reduced / shards, replicas)
    unsharded = outside + sum(size for _, size in sizes.most_common(2))
    parts = {kind: getattr(whole, kind) / shards for kind in ("weights", "gradients", "state", "master")}
    lent = float(unsharded * gathered.itemsize)
    return Memory(whole.elements, whole.trained, **parts, lent=lent, sent=sent, modules=tuple(modules))


def ring(kind: str, size: float, ranks: int) -> float:
    """Bytes that each of `ranks` sends when a collective goes round a ring.

    Args:
        kind: `all_reduce`, `all_gather` or `reduce_scatter`.
        size: bytes of the whole tensor.
        ranks: how many take part.

    Returns:
        The bytes; the usual bandwidth-optimal count (Patarasu and Yuan, 2009).

    >>> ring("all_reduce", 100, 4), ring("all_gather", 100, 4)
    (150.0, 75.0)
    """
    share = size * (ranks - 1) / ranks
    return 2 * share if kind == "all_reduce" else share


def blocks(names: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Find which block of layers each module belongs to: the modules directly in a ModuleList.

    Args:
        names: `(qualified name, class name)` of every module.

    Returns:
        The block's name, by the qualified name of what is in one; outermost lists count.

    >>> blocks([("", "GPT"), ("h", "ModuleList"), ("h.0", "Block"), ("h.0.fc", "Linear"), ("head", "Linear")])
    {'h.0': 'h.0', 'h.0.fc': 'h.0'}
    """
    lists: list[str] = []
    found: dict[str, str] = {}
    for fqn, kind in names:
        above = next((one for one in lists if fqn.startswith(f"{one}." if one else "")), None)
        if above is not None:
            below = fqn[len(above) + 1 :] if above else fqn
            found[fqn] = fqn[: len(fqn) - len(below)] + below.split(".")[0]
        elif kind == "ModuleList":
            lists.append(fqn)
    return found
