"""Divides gradients by the loss scale, and says by a flag on the device whether any was inf or nan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wrapprec.sharded import local


def scalar(number: Tensor, like: Tensor) -> Tensor:
    """A number where a tensor is: the host waits for one that it gets itself, and for no other."""
    # Not waited for, it would be read before it is there: what a copy to the host is made into is pinned memory.
    return number if number.device == like.device else number.to(like.device, non_blocking=not like.is_cpu)


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, sharing its memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def values_of(tensor: Tensor) -> Tensor:
    """The numbers of a tensor on this rank, sharing its memory, of whatever layout it is."""
    tensor = local(tensor)
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


def check_and_scale_(grads: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Multiply dense gradients in place by `factor` and say, one flag per device and dtype, whether any is inf or nan.

    Args:
        grads: dense floating tensors on any devices; they must be nobody else's.
        factor: float32, shape ().

    Returns:
        Flags, float32 of shape (): 1.0 where an element was inf or nan, before or after the product.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    flags = []
    for (device, dtype), group in groups.items():
        flag = torch.zeros((), dtype=torch.float32, device=device)
        # CUDA's kernel takes no bfloat16 (torch 2.13), and nothing else keeps the factor in float32.
        wide = [grad.float() for grad in group] if dtype is torch.bfloat16 else group
        torch._amp_foreach_non_finite_check_and_unscale_(wide, flag, scalar(factor, flag))
        if wide is not group:
            torch._foreach_copy_(group, wide)
        flags.append(flag)
    return flags


def non_finite(grads: list[Tensor], device: torch.device) -> Tensor:
    """1.0 if any gradient holds inf or nan, else 0.0; float32 of shape () on `device`, no host read."""
    dense = [g._values() if g.layout is torch.sparse_coo else g for g in map(local, grads)]
    fits = [g.is_floating_point() and torch._debug_has_internal_overlap(g) == 0 for g in dense]
    plain = [g for g, fit in zip(dense, fits, strict=True) if fit]
    flags = check_and_scale_(plain, torch.ones((), dtype=torch.float32, device=device)) if plain else []
    flags += [1.0 - torch.isfinite(g).all().to(torch.float32) for g, fit in zip(dense, fits, strict=True) if not fit]
    found = torch.zeros((), dtype=torch.float32, device=device)
    for flag in flags:
        found = torch.maximum(found, scalar(flag, found))
    return found
