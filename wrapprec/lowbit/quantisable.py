"""Which weights of a model a weight format is for: frozen ones of linear layers, and of embeddings with a rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wrapprec import dtypes
from wrapprec.dtypes import MIXABLE, WEIGHT_FORMATS
from wrapprec.lowbit.sizes import FOUR_BITS

if TYPE_CHECKING:
    from wrapprec.defaults import Decision
    from wrapprec.placement import Placement
    from wrapprec.precision import Precision

TRAINING = "int8-training"
"""The one format whose weights train: they stay in float32, and products see them rounded."""


def is_packed(weight: Tensor | None) -> bool:
    """Say whether a weight is stored in a format already: as bytes, for which torch knows no gradient."""
    return weight is not None and weight.dtype in (torch.uint8, torch.int8)


def is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is GPT-2's linear layer: its weight is that of a Linear, transposed."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def settle(
    modules: Sequence[tuple[str, nn.Module]], decisions: Sequence[Decision]
) -> list[tuple[Precision, tuple[str, ...]]]:
    """Bring decisions for a weight format to what each module can do.

    Where a rule (or the policy) governs frozen layers and trained ones, the trained ones stay in float32: adapters
    beside the base that they adapt. Where it governs trained ones alone they are planned in the format, which `wrap`
    refuses if its optimizer trains them.

    Args:
        modules: every module under every name, in the order of the decisions.
        decisions: what governs each.

    Returns:
        For each the precision, with float32 parameters where the weight is not stored in the format, and notes with the
        reason where it might have been.
    """
    homes = Counter(id(p) for m in {id(m): m for _, m in modules}.values() for p in m._parameters.values())
    unfit: list[str | None] = []
    bases: set[str] = set()
    for (name, module), decision in zip(modules, decisions, strict=True):
        form = decision.precision.param_dtype
        asked = decision.reason == f'matched at "{name}"'
        reason = why_not(module, form, asked, homes) if isinstance(form, str) else None
        unfit.append(reason)
        if isinstance(form, str) and reason is None and not _requires_grad(module):
            bases.add(decision.rule)
    settled: list[tuple[Precision, tuple[str, ...]]] = []
    for (_, module), decision, reason in zip(modules, decisions, unfit, strict=True):
        form = decision.precision.param_dtype
        stored = _stored_as(module._parameters.get("weight"))
        if stored is not None:
            notes = () if stored == form else (f"stored as {stored} already",)
            settled.append((replace(decision.precision, param_dtype=stored), notes))
            continue
        if form not in WEIGHT_FORMATS:
            settled.append((decision.precision, ()))
            continue
        if reason is None and form != TRAINING and _requires_grad(module) and decision.rule in bases:
            reason = "it is trained, beside frozen layers"
        if reason is None:
            settled.append((decision.precision, ()))
        else:
            notes = (f"not {form}: {reason}",) if reason else ()
            settled.append((replace(decision.precision, param_dtype=torch.float32), notes))
    return settled


def why_not(module: nn.Module, form: str, asked: bool, homes: Counter[int]) -> str | None:
    """Say why the weight of a module is not stored in a format.

    Args:
        module: any module.
        form: the weight format.
        asked: a rule selects this very module, not only what is around it.
        homes: how many places a parameter has in the model, by its id.

    Returns:
        The reason; the empty string where nobody would expect it; None where it can be stored so.

    >>> from collections import Counter
    >>> why_not(nn.Linear(4, 2), "nf4", False, Counter()), why_not(nn.ReLU(), "nf4", False, Counter())
    (None, '')
    """
    weight = module._parameters.get("weight")
    if is_packed(weight):
        return None
    if type(module) is nn.Embedding:
        if form not in FOUR_BITS:
            return "only the 4-bit formats are for embeddings" if asked else ""
        if not asked:
            return "an embedding needs a rule of its own"
        if module.max_norm is not None or module.sparse:
            return "it writes into its weight, or wants sparse gradients"
    elif type(module) is not nn.Linear and not (is_conv1d(module) and form != TRAINING):
        wants = (asked and bool(module._parameters)) or isinstance(module, nn.Linear)
        return f"only torch.nn.Linear is, not {type(module).__name__}" if wants else ""
    if weight is None:
        return "its weight is computed by a hook"
    if is_lazy(weight) or weight.is_meta:
        return "its weight has no storage"
    if weight.numel() <= 2:  # bitsandbytes takes a packed weight of one byte for a transposed one
        return "its weight is too small"
    if homes[id(weight)] > 1:
        return "its weight is shared with another module"
    if form == TRAINING:
        return None
    if weight.dtype not in MIXABLE:
        return f"its weight is {dtypes.name(weight.dtype)}"
    if _has_own_forward(module):
        return "it has a forward of its own, or is offloaded"
    return None


def missed(asked: bool, placements: Iterable[Placement]) -> str | None:
    """What to say of a plan that asks for a weight format, if no weight of it is stored so."""
    if not asked or any(placement.precision.param_dtype in WEIGHT_FORMATS for placement in placements):
        return None
    return "quantised weights were asked for, and no weight can be stored so: the plan says why"


def elements(param: Tensor) -> int:
    """How many numbers a parameter holds; bytes of 4 bits hold two."""
    state = getattr(param, "quant_state", None)
    return param.numel() if state is None else math.prod(state.shape)


def stored_form(name: str, precision: Precision) -> str | None:
    """The format in which a parameter of this name is stored under a settled precision; None for its own dtype."""
    form = precision.param_dtype
    return form if name == "weight" and isinstance(form, str) and form != TRAINING else None


def stored_shape(module: nn.Module, param: Tensor) -> tuple[int, ...]:
    """The shape of a parameter as it is, or was before it was packed; that of a Conv1D as a linear layer's."""
    state = getattr(param, "quant_state", None)
    shape = tuple(param.shape if state is None else state.shape)
    return shape[::-1] if is_conv1d(module) and len(shape) == 2 and not is_packed(param) else shape


def _stored_as(weight: Tensor | None) -> str | None:
    """The format of a packed weight, whoever packed it; None for any other."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return f"{state.quant_type}-dq" if state.nested else str(state.quant_type)
    return "int8" if weight is not None and getattr(weight, "SCB", None) is not None else None


def _requires_grad(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.requires_grad


def _has_own_forward(module: nn.Module) -> bool:
    own = module.__dict__
    forward = own.get("forward")
    return "_hf_hook" in own or (forward is not None and getattr(forward, "replaced", forward) is not None)
