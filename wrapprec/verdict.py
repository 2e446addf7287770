"""Whether an optimizer's gradients are finite, and what that means for the scales of the models it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wrapprec.boundary import check_and_scale_
from wrapprec.diagnose import Diagnosis
from wrapprec.errors import NonFiniteError, message
from wrapprec.scale import Scaler
from wrapprec.state import Shared


def scalers(models: list[Shared]) -> list[Scaler]:
    """The loss scales of `models`."""
    return [model.scaler for model in models if model.scaler is not None]


def judge(optimizer: Optimizer, owner: Any, models: list[Shared]) -> Tensor:
    """Decide on the device whether the step must be skipped, and update the scales of `models`.

    A step is skipped when backward saw inf or nan in this optimizer's parameters (also where clipping has hidden it
    since), or when a ``.grad`` holds inf or nan now (the user or a collective put it there).

    Args:
        optimizer: its parameters' gradients are checked.
        owner: under which the buckets know it.
        models: the wrapped models whose parameters it steps; at least one.

    Returns:
        1.0 to skip, else 0.0: float32, shape (), on the first model's device. Nothing was read on the host.
    """
    device = scalers(models)[0].device
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    at_step = non_finite(grads, device)
    records = []
    for model in models:
        flags = [b.found.to(device) for b in model.buckets if b.counts_for(owner) and b.found is not None]
        records.append(torch.stack(flags).amax() if flags else torch.zeros_like(at_step))
    skip = torch.stack([at_step, *records]).amax()
    for scaler, recorded in zip(scalers(models), records, strict=True):
        _update(scaler, torch.maximum(recorded, at_step), recorded, skip)
    for model in models:
        for bucket in model.pending():
            if owner in bucket.owners:
                bucket.consume(owner)
    return skip


def _update(scaler: Scaler, found: Tensor, recorded: Tensor, skip: Tensor) -> None:
    if not scaler.touched:
        # Backward's own overflow was counted by the first update since; only what came later is still due.
        scaler.owe((found - recorded).clamp(min=0))
        return
    for peer in list(scaler.peers):
        if peer is not scaler:
            peer.lower()
    scaler.update(found, skip)


def judge_patience(models: list[Shared], consecutive: list[float]) -> bool:
    """Raise when skipping has become pointless.

    Args:
        models: those with a loss scale.
        consecutive: how many overflows in a row each has had at its lowest scale.

    Returns:
        True when the next overflow will be one too many: then every step must be looked at on the host.

    Raises:
        NonFiniteError: naming the first module and tensor that went non-finite.
    """
    close = False
    for model, count in zip(models, consecutive, strict=True):
        assert model.scaler is not None
        most = model.scaler.config.max_consecutive_skips
        if count >= most and model.diagnosis is not None:
            finding, remedy = model.diagnosis.finding()
            model.diagnosis = None
            received = f"{int(count)} skipped steps in a row at the lowest loss scale; {finding}"
            raise NonFiniteError(message("finite gradients", received, remedy=remedy))
        near = count >= most - 1
        model.diagnosis = Diagnosis() if near else None
        close |= near
    return close


def non_finite(grads: list[Tensor], device: torch.device) -> Tensor:
    """1.0 if any gradient holds inf or nan, else 0.0; float32 of shape () on `device`, no host read."""
    dense = [g._values() if g.layout is torch.sparse_coo else g for g in grads]
    fits = [g.is_floating_point() and torch._debug_has_internal_overlap(g) == 0 for g in dense]
    plain = [g for g, fit in zip(dense, fits, strict=True) if fit]
    flags = check_and_scale_(plain, torch.ones((), device=device)) if plain else []
    flags += [1.0 - torch.isfinite(g).all().to(torch.float32) for g, fit in zip(dense, fits, strict=True) if not fit]
    found = torch.zeros((), device=device)
    for flag in flags:
        found = torch.maximum(found, flag.to(device, non_blocking=True))
    return found
