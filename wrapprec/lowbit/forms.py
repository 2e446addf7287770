"""Which optimizers and parameters can have quantised state, and which optimizers of bitsandbytes are right."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from wrapprec.errors import PolicyError, message

Form = dict[str, bool]
"""The names of the state that is quantised; True for what has a sign."""

_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}

_FORMS: dict[type[Optimizer], Form] = {
    # In this order: torch's AdamW is an Adam.
    AdamW: {**_MOMENTS, "max_exp_avg_sq": False},
    Adam: {**_MOMENTS, "max_exp_avg_sq": False},
    NAdam: _MOMENTS,
    RAdam: _MOMENTS,
    SGD: {"momentum_buffer": True},
    RMSprop: {"square_avg": False, "momentum_buffer": True},
    Adagrad: {"sum": False},
}
_WITH_FORM = {8: tuple(_FORMS), 4: (AdamW, Adam)}
"""torchao has 4-bit maps for Adam's moments."""


def form_of(optimizer: Optimizer, bits: int) -> Form:
    """Name the state of an optimizer that can be kept in `bits` bits.

    Args:
        optimizer: one of torch's, or of a subclass that steps as torch's does.
        bits: 8 or 4.

    Raises:
        PolicyError: there is no such form; it lists those that have one.
    """
    kind = next((kind for kind in _WITH_FORM[bits] if isinstance(optimizer, kind)), None)
    if kind is None or not _steps_as(optimizer, kind):
        raise PolicyError(
            message(
                f"an optimizer that has a form with {bits}-bit state: "
                + ", ".join(kind.__name__ for kind in sorted(_WITH_FORM[bits], key=lambda kind: kind.__name__)),
                f"{type(optimizer).__name__} (of {type(optimizer).__module__})"
                + ("" if kind is None else f", which has its own way to step a {kind.__name__}"),
                remedy="its state has few bits already: leave optimizer_bits out"
                if _is_bitsandbytes(optimizer)
                else "use one of these, or leave optimizer_bits out",
            )
        )
    for number, group in enumerate(optimizer.param_groups):
        check_group(optimizer, group, number)
    return _FORMS[kind]


def check_group(optimizer: Optimizer, group: dict[str, Any], number: int) -> None:
    """Refuse the settings that quantised state cannot serve.

    Raises:
        PolicyError: naming the setting and the reason.
    """
    reasons = {
        "centered": "the difference of two quantised moments may be negative, and its root nan",
        "differentiable": "a gradient does not pass through rounding",
        "capturable": "state is quantised to new memory at every step, which a captured graph would not see",
    }
    for setting, reason in reasons.items():
        if group.get(setting):
            raise PolicyError(
                message(
                    f"{type(optimizer).__name__} without {setting} for optimizer_bits: {reason}",
                    f"{setting}=True",
                    where=f"param_groups[{number}]",
                    remedy=f"build it with {setting}=False, or leave optimizer_bits out",
                )
            )


def is_the_schedulers(step: Any, optimizer: Optimizer) -> bool:
    """Whether an instance's own step is the mark of a scheduler on the class's, and nothing else.

    Raises:
        PolicyError: it is wrapprec's own already.
    """
    home = getattr(step, "__globals__", {}).get("__name__", "")
    if home.startswith("wrapprec."):
        raise PolicyError(
            message(
                "optimizer_bits with the first call that an optimizer is given to",
                f"{type(optimizer).__name__}, whose steps are guarded already",
                remedy="give optimizer_bits to that call, or unwrap first",
            )
        )
    return is_mark(step, optimizer)


def is_mark(step: Any, optimizer: Optimizer) -> bool:
    """Whether a function is what a scheduler puts around the class's step to note that it was called."""
    home = getattr(step, "__globals__", {}).get("__name__", "")
    return home == "torch.optim.lr_scheduler" and getattr(step, "__wrapped__", None) is type(optimizer).step


def check_plain(param: Tensor) -> None:
    if hasattr(param, "to_local"):
        raise PolicyError(
            message(
                "parameters that are plain tensors, for optimizer_bits",
                f"a {type(param).__name__} of shape {tuple(param.shape)}, as fully_shard makes them",
                remedy="leave optimizer_bits out, and build torchao.optim.AdamW8bit or AdamW4bit after sharding",
            )
        )


def _steps_as(optimizer: Optimizer, kind: type[Optimizer]) -> bool:
    """Whether a subclass computes with torch's own code, of which it is known what it does to the state."""
    names = ("step", "_init_group", "__setstate__")
    mine = [inspect.unwrap(getattr(type(optimizer), name)) for name in names]
    return all(function is inspect.unwrap(getattr(kind, name)) for name, function in zip(names, mine, strict=True))


# bitsandbytes' own optimizers


def _is_bitsandbytes(optimizer: Optimizer) -> bool:
    return any(kind.__module__.partition(".")[0] == "bitsandbytes" for kind in type(optimizer).__mro__)


def check_foreign(optimizer: Optimizer) -> None:
    """Refuse an optimizer of bitsandbytes that computes something else than it says.

    Raises:
        PolicyError: LAMB or LARS with 8-bit state, whose kernel ignores the trust ratio; AdEMAMix32bit, which makes too
            little state for its kernel.
    """
    if not _is_bitsandbytes(optimizer):
        return
    name, args = str(getattr(optimizer, "optimizer_name", "")), getattr(optimizer, "args", None)
    if name == "ademamix" and not hasattr(optimizer, "_get_state_double_buffer"):
        raise _wrong(
            optimizer, ", which makes room for one of its two averages, and its kernel writes both", "AdEMAMix", ""
        )
    if args is None or args.max_unorm <= 0.0 or args.optim_bits != 8:
        return
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param.numel() >= args.min_8bit_size and not _heeds_trust_ratio(name, param.device):
                fault = (
                    f", whose 8-bit kernel ignores the trust ratio on {param.device.type}: with it a step is at most"
                    " max_unorm times as long as the weights, without it of any length"
                )
                where = f"param_groups[{number}], of shape {tuple(param.shape)}"
                raise _wrong(optimizer, fault, name.upper(), where)


def _wrong(optimizer: Optimizer, fault: str, instead: str, where: str) -> PolicyError:
    return PolicyError(
        message(
            "an optimizer that computes what it says",
            f"{type(optimizer).__name__}{fault}",
            where=where or None,
            remedy=f"use bitsandbytes' {instead} with optim_bits=32, or AdamW8bit",
        )
    )


@functools.cache
def _heeds_trust_ratio(name: str, device: torch.device) -> bool:
    """Take one 8-bit step that the ratio, if anything looks at it, makes small."""
    optim = sys.modules["bitsandbytes"].optim
    param = torch.nn.Parameter(torch.full((4096,), 2.0**-10, device=device))
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    probe = {"lamb": optim.LAMB8bit, "lars": optim.LARS8bit}[name]
    probe([param], lr=1.0, weight_decay=0.0, **({"momentum": 0.9} if name == "lars" else {})).step()
    moved: Tensor = (param.detach() - before).norm()
    # Adam's first step is 1 in each element, and momentum's is the gradient; both times 2**10 the norm of the weights.
    return bool(moved <= 2 * before.norm())
