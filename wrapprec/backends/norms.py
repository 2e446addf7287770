"""Whether torch's normalisations take low precision activations with float32 parameters, found by trying them once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from wrapprec.backends import ABSENT

NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "LayerNorm": (nn.LayerNorm, (8,), (4, 8)),
    "RMSNorm": (nn.RMSNorm, (8,), (4, 8)),
    "GroupNorm": (nn.GroupNorm, (2, 8), (4, 8, 3)),
    "BatchNorm1d": (nn.BatchNorm1d, (8,), (4, 8)),
    "BatchNorm2d": (nn.BatchNorm2d, (8,), (4, 8, 3, 3)),
    "BatchNorm3d": (nn.BatchNorm3d, (8,), (4, 8, 2, 2, 2)),
    "SyncBatchNorm": (nn.SyncBatchNorm, (8,), (4, 8, 3, 3)),
    "InstanceNorm1d": (nn.InstanceNorm1d, (8,), (4, 8, 5)),
    "InstanceNorm2d": (nn.InstanceNorm2d, (8,), (4, 8, 3, 3)),
    "InstanceNorm3d": (nn.InstanceNorm3d, (8,), (4, 8, 2, 2, 2)),
}


def norm_kind(module: nn.Module) -> str | None:
    """Name the torch normalisation that a module is, or descends from.

    Args:
        module: any module.

    Returns:
        The class name, or None for a module that is none of those with float32 parameters.

    >>> norm_kind(nn.BatchNorm2d(3)), norm_kind(nn.Linear(2, 2))
    ('BatchNorm2d', None)
    """
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.modules.") and kind.__name__ in NORMS:
            return kind.__name__
    return None


def probe_norm(kind: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Run a tiny norm of a kind forward and backward; random state, gradient mode and autocast stay as they are.

    Args:
        kind: from `norm_kind`.
        dtype: of the activations.
        device: where.

    Returns:
        True if it ran in both modes without an exception or a warning, answered in `dtype`, and differed from the
        float32 result by rounding only.
    """
    # Warnings marked "once" in C++ would hide a slow path that an earlier call has already warned of.
    always = torch.is_warn_always_enabled()
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        try:
            with torch.autocast(device.type, enabled=False):
                agrees = all(_agrees(kind, dtype, device, training) for training in (True, False))
        except (ValueError, *ABSENT):
            return False
        finally:
            torch.set_warn_always(always)
    return agrees and not caught


def _agrees(kind: str, dtype: torch.dtype, device: torch.device, training: bool) -> bool:
    """Run the norm in the mix and in float32, and compare outputs, running statistics and weight gradients."""
    make, arguments, shape = NORMS[kind]
    affine = {"affine": True} if kind.startswith("Instance") else {}
    results = []
    for activations in (dtype, torch.float32):
        norm = make(*arguments, **affine, device=device, dtype=torch.float32).train(training)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel(), device=device))
        grid = torch.linspace(-3, 5, torch.Size(shape).numel(), device=device, dtype=torch.float32)
        data = grid.cos().reshape(shape).to(dtype)
        out = norm(data.to(activations).requires_grad_())
        if out.dtype != activations:
            return False
        (gradient,) = torch.autograd.grad(out, [next(norm.parameters())], grad_outputs=data.to(out.dtype))
        if gradient.dtype != torch.float32:
            return False
        statistics = [buffer for buffer in norm.buffers() if buffer.is_floating_point()]
        results.append((out.detach().float(), gradient, *statistics))
    # Outputs are rounded once, and so is what backward recomputes: two units in the last place of the largest value.
    unit = 2 * torch.finfo(dtype).eps
    return all(
        bool(((mixed - true).abs().max() <= unit * true.abs().max()).item())
        for mixed, true in zip(*results, strict=True)
    )
