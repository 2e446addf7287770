"""What the defaults say of a module: what stays in float32, and what its device or its own code could not do lower."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from wrapprec import dtypes
from wrapprec.allowlist import STRICTLY, is_listed, keep_pattern, keeps_float32, scatter_note
from wrapprec.backends.base import Backend
from wrapprec.fills import overfill
from wrapprec.precision import F32, Precision

_ISLAND = Precision(F32, F32, F32)

_CAST_BY_AUTOCAST = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)
"""Modules whose weights autocast would cast at every call: what `frozen()` casts once under op casting."""


def is_cast_by_autocast(module: nn.Module) -> bool:
    """Only torch's own code is known to hand its weights to autocast as they are.

    Attention in eval mode is not: on a CPU it takes a kernel that autocast does not know, if its weights are float32.
    """
    if not isinstance(module, _CAST_BY_AUTOCAST) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    owner = next(kind for kind in type(module).__mro__ if "forward" in kind.__dict__)
    return owner.__module__.startswith("torch.nn.modules.")


def copies_weights(module: nn.Module, precision: Precision) -> bool:
    """Say whether a step holds low precision copies of a module's own weights, from its forward to its backward.

    Args:
        module: the module.
        precision: what it got.

    Returns:
        False also for what computes in the dtype that its weights have, and where fp8 is made of them.
    """
    if precision.casting == "op":
        return precision.compute_dtype != "fp8" and is_cast_by_autocast(module)
    return precision.casting == "module" and not has_wide_statistics(module)


def has_wide_statistics(module: nn.Module) -> bool:
    """Whether a norm of torch has statistics in float32, as buffers are: its kernels want its weights alike.

    >>> has_wide_statistics(nn.BatchNorm1d(2)), has_wide_statistics(nn.BatchNorm1d(2, track_running_stats=False))
    (True, False)
    """
    if not isinstance(module, nn.modules.batchnorm._NormBase) or module.running_mean is None:
        return False
    return module.running_mean.dtype is torch.float32


def keeps_weights(module: nn.Module, parametrised: set[int]) -> bool:
    """Whether a module's parameters must stay as wide as they are: what is computed from them is cast instead.

    Args:
        module: any module of the model.
        parametrised: the ids of the modules within parametrisations.
    """
    renormalises = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    return renormalises or id(module) in parametrised


def within_parametrisations(model: nn.Module) -> set[int]:
    """The ids of the modules that are parts of a parametrisation."""
    lists = (module for module in model.modules() if isinstance(module, ParametrizationList))
    return {id(below) for module in lists for below in module.modules()}


class Keeper(NamedTuple):
    """A module that lists names to keep in float32: its own name, what it lists, and what it lists strictly."""

    name: str
    pattern: re.Pattern[str]
    strict: re.Pattern[str] | None

    @classmethod
    def of(cls, fqn: str, module: nn.Module) -> Keeper | None:
        """The keeper that a module is, if it lists anything."""
        pattern = keep_pattern(module)
        return None if pattern is None else cls(fqn, pattern, keep_pattern(module, strict=True))


class Decision(NamedTuple):
    """What governs a module: where the rule matched, and what it says; `own`: of this module's own code only."""

    precision: Precision
    rule: str
    reason: str
    is_default: bool = False
    own: bool = False


def default(fqn: str, module: nn.Module, keepers: tuple[Keeper, ...]) -> Decision | None:
    """Say whether a module stays in float32 for what it is.

    Args:
        fqn: its qualified name.
        module: the module.
        keepers: the modules above it that list what they want in float32.

    Returns:
        The decision, or None.
    """
    reason = keeps_float32(fqn, module)
    if reason is None:
        for owner, pattern, strict in keepers:
            relative = fqn[len(owner) + 1 :] if owner else fqn
            if relative and is_listed(relative, module, pattern):
                strictly = strict is not None and is_listed(relative, module, strict)
                reason = STRICTLY if strictly else "kept by the Hugging Face model"
                break
    if reason is None:
        return None
    return Decision(_ISLAND, f"default: {reason}", f"computed in float32: {reason}", is_default=True)


def cannot(module: nn.Module, around: Precision, backend: Backend, device: torch.device) -> Decision | None:
    """Say whether a module would break in the precision around it.

    Args:
        module: the module.
        around: the precision.
        backend: of the device.
        device: where it computes.

    Returns:
        Float32, for the whole module where its kernel fails, and for its own code alone where that uses a number
        past the range of the dtype; None where it would not break.
    """
    if not isinstance(around.compute_dtype, torch.dtype):
        return None
    kernel = _missing_kernel(module, around, backend, device)
    if kernel is not None:
        return Decision(_ISLAND, f"default: {kernel}", f"computed in float32: {kernel}, probed", is_default=True)
    number = overfill(module, around.compute_dtype)
    if number is None:
        return None
    past = f"{number} is past {dtypes.name(around.compute_dtype)}'s range"
    reason = f"its own code is computed in float32, what is below it as around it: {past}"
    return Decision(_ISLAND, f"default: {past}", reason, is_default=True, own=True)


def notes(module: nn.Module, precision: Precision, backend: Backend, device: torch.device) -> tuple[str, ...]:
    """Say what else to know of a module in its precision, one that the user's rules gave it included.

    Args:
        module: the module.
        precision: what it got.
        backend: of the device.
        device: where it computes.

    Returns:
        Notes for the plan.
    """
    if not dtypes.is_low(precision.compute_dtype):
        return ()
    kernel = _missing_kernel(module, precision, backend, device)
    unfit = None if kernel is None else f"{kernel}: drop the rule if it fails"
    return tuple(note for note in (scatter_note(module), unfit) if note)


def _missing_kernel(module: nn.Module, precision: Precision, backend: Backend, device: torch.device) -> str | None:
    """What recurrent network the device does not compute in this precision, if it is one."""
    dtype, autocasts = precision.compute_dtype, precision.casting == "op"
    if not isinstance(dtype, torch.dtype) or backend.runs_rnn(module, dtype, autocasts, device):
        return None
    how = " under autocast" if autocasts else ""
    return f"no {dtypes.name(dtype)} {type(module).__name__} on this {device.type}{how}"
