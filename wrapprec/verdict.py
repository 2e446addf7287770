"""Whether an optimizer's gradients are finite, and what that means for the scales of the models it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wrapprec.diagnose import Diagnosis
from wrapprec.errors import NonFiniteError, message
from wrapprec.flags import non_finite
from wrapprec.ranks import agree, is_distributed
from wrapprec.scale import Scaler
from wrapprec.state import Shared


def scalers(models: list[Shared]) -> list[Scaler]:
    """The loss scales of `models`."""
    return [model.scaler for model in models if model.scaler is not None]


def judge(optimizer: Optimizer, owner: Any, models: list[Shared], all_models: list[Shared]) -> Tensor:
    """Decide on the device whether the step must be skipped, and update the scales of `models`.

    A step is skipped when backward saw inf or nan in this optimizer's parameters (also where clipping has hidden it
    since), or when a ``.grad`` holds inf or nan now (the user or a collective put it there).

    Args:
        optimizer: its parameters' gradients are checked.
        owner: under which the buckets know it.
        models: the wrapped models whose parameters it steps; at least one.
        all_models: those, and the others of the same handle: ranks agree on the scales of all.

    Returns:
        1.0 to skip, else 0.0: float32, shape (), on the first model's device. Nothing was read on the host.
    """
    device = scalers(models)[0].device
    parts = _by_model(optimizer, models)
    at_step = [non_finite(grads, device) for grads in parts]
    records = []
    for model in models:
        held = [b for b in (*model.buckets, *model.retired) if b.counts_for(owner)]
        flags = [b.found.to(device) for b in held if b.found is not None]
        records.append(torch.stack(flags).amax() if flags else torch.zeros((), dtype=torch.float32, device=device))
    numbers = torch.stack([*at_step, *records])
    touched: dict[int, Tensor] = {}
    if is_distributed():
        members = [(model.ranks, model.scaler, model.ids) for model in all_models if model.scaler is not None]
        numbers, touched = agree(members, numbers)
        at_step, records = list(numbers[: len(at_step)]), list(numbers[len(at_step) :])
    skip = numbers.amax()
    # What is nobody's (the last part) tells of no model in particular.
    strange = at_step.pop() if len(parts) > len(models) else torch.zeros((), dtype=torch.float32, device=device)
    for scaler, recorded, now in zip(scalers(models), records, at_step, strict=True):
        found = torch.stack([recorded, now, strange]).amax()
        _update(scaler, found, recorded, skip, touched.get(id(scaler)))
    for model in models:
        for bucket in model.pending():
            if owner in bucket.owners:
                bucket.consume(owner)
    return skip


def _by_model(optimizer: Optimizer, models: list[Shared]) -> list[list[Tensor]]:
    """The gradients of each model, and, if there is more than one, those of no model."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if len(models) == 1:
        return [[p.grad for p in params]]
    parts: list[list[Tensor]] = [[] for _ in range(len(models) + 1)]
    for param in params:
        mine = [part for part, model in zip(parts, models, strict=False) if id(param) in model.ids]
        for part in mine or parts[-1:]:
            part.append(param.grad)
    return parts


def _update(scaler: Scaler, found: Tensor, recorded: Tensor, skip: Tensor, elsewhere: Tensor | None) -> None:
    if not scaler.touched:
        # Backward's own overflow was counted by the first update since; only what came later is still due.
        owed = (found - recorded).clamp(min=0)
        if elsewhere is None:
            scaler.owe(owed)
        else:
            scaler.update_where(elsewhere, found, skip, owed)
        return
    for peer in scaler.peers:
        if peer is not scaler:
            peer.lower()
    scaler.update(found, skip)


def counts(models: list[Shared]) -> list[Tensor]:
    """What `judge_patience` wants to know, to be read together with whatever else is read."""
    return [number for scaler in scalers(models) for number in (scaler.consecutive, scaler.scale)]


def judge_patience(models: list[Shared], numbers: list[float]) -> bool:
    """Raise when skipping has become pointless.

    Args:
        models: those with a loss scale.
        numbers: the values of `counts`: overflows in a row at the lowest scale, and the scale.

    Returns:
        True when the next overflow will be one too many: then every step must be looked at on the host.

    Raises:
        NonFiniteError: naming the first module and tensor that went non-finite.
    """
    close = False
    for model, count, scale in zip(models, numbers[::2], numbers[1::2], strict=True):
        assert model.scaler is not None
        config = model.scaler.config
        if count >= config.max_consecutive_skips and model.diagnosis is not None and model.diagnosis.complete:
            finding, remedy = model.diagnosis.finding()
            model.diagnosis = Diagnosis()
            received = f"{int(count)} skipped steps in a row at the lowest loss scale, {scale}; {finding}"
            raise NonFiniteError(message("finite gradients", received, remedy=remedy))
        near = count >= config.max_consecutive_skips - 1 and (not config.dynamic or scale <= config.min_scale)
        if not near or model.diagnosis is None or model.diagnosis.complete:
            model.diagnosis = Diagnosis() if near else None
        close |= near
    return close
