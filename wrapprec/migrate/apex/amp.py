"""Apex's `amp`: the same names and arguments, and gradients that are true as soon as they are there.

What differs: each *model* has a loss scale, not each loss; parameters stay float32 and are the master weights; steps
are skipped by the optimizer itself, so that `delay_unscale` and `delay_overflow_check` have nothing to delay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wrapprec.migrate.apex.casts import (
    disable_casts,
    float_function,
    half_function,
    promote_function,
    register_float_function,
    register_half_function,
    register_promote_function,
)
from wrapprec.migrate.apex.first import init
from wrapprec.migrate.apex.notes import note
from wrapprec.migrate.apex.options import build_policy, build_scale, read_options
from wrapprec.migrate.apex.saved import AmpState, load_state_dict, state_dict
from wrapprec.migrate.apex.session import Call, session
from wrapprec.wrap import wrap

__all__ = [
    "disable_casts",
    "float_function",
    "half_function",
    "init",
    "initialize",
    "load_state_dict",
    "master_params",
    "promote_function",
    "register_float_function",
    "register_half_function",
    "register_promote_function",
    "scale_loss",
    "state_dict",
]

_amp_state = AmpState()


def initialize(
    models: Any,
    optimizers: Any = None,
    enabled: bool = True,
    opt_level: str = "O1",
    cast_model_type: Any = None,
    patch_torch_functions: bool | None = None,
    keep_batchnorm_fp32: Any = None,
    master_weights: Any = None,
    loss_scale: Any = None,
    cast_model_outputs: torch.dtype | None = None,
    num_losses: int = 1,
    verbosity: int = 1,
    min_loss_scale: float | None = None,
    max_loss_scale: float | None = 2.0**24,
) -> Any:
    """Wrap the models, and guard the optimizers.

    Args:
        models: one, or a list; also such that DistributedDataParallel is around already.
        optimizers: one, a list, or None; those made later are guarded by `scale_loss`.
        enabled: False leaves everything as it is.
        opt_level: `O0` is float32, `O1` the policy `16-mixed`, `O2` `16-module`, `O3` `16-true`.
        cast_model_type: overrides what O2 and O3 compute in; torch.bfloat16 works, too.
        patch_torch_functions: False with O1 computes in float32.
        keep_batchnorm_fp32: overrides whether O2 and O3 compute batch normalisation in float32.
        master_weights: overrides whether there are float32 weights (`16-module`) or not (`16-true`).
        loss_scale: `dynamic`, or a number that holds for good.
        cast_model_outputs: what the models' outputs are cast to; float32 where it is left out.
        num_losses: how many `loss_id` there are; the scale is the model's all the same.
        verbosity: 0 says nothing; 2 prints the plan.
        min_loss_scale: a floor; 1.0 where it is left out.
        max_loss_scale: a ceiling.

    Returns:
        What was given: the models, and the optimizers unless they were left out; lists where lists were given.

    Raises:
        PolicyError: an option is unknown, or contradicts another; nothing is changed then.
        AlreadyWrappedError: one of the models was initialized before, with other options.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model, optimizer = initialize(model, optimizer, opt_level="O1", loss_scale=128.0, verbosity=0)
    >>> with scale_loss(model(torch.ones(1, 4)).sum(), optimizer) as scaled_loss:
    ...     scaled_loss.backward()
    >>> model.bias.grad
    tensor([1., 1.])
    """
    given = models if optimizers is None else (models, optimizers)
    if not enabled:
        session.enabled = False
        return given
    overrides = {
        "cast_model_type": cast_model_type,
        "patch_torch_functions": patch_torch_functions,
        "keep_batchnorm_fp32": keep_batchnorm_fp32,
        "master_weights": master_weights,
        "loss_scale": loss_scale,
    }
    options = read_options(opt_level, overrides)
    model_list = list(models) if isinstance(models, (list, tuple)) else [models]
    optimizer_list = _optimizers(optimizers)
    request = options, cast_model_outputs, min_loss_scale, max_loss_scale
    call = session.known(model_list, request)
    if call is None:
        policy = build_policy(options, [m for m in model_list if isinstance(m, nn.Module)], cast_model_outputs)
        scale = build_scale(options, min_loss_scale, max_loss_scale)
        handle = wrap(model_list, optimizer_list or None, policy, loss_scale=scale)
        call = Call(handle, request, options, num_losses)
        call.attached.update(optimizer_list)
        session.calls.append(call)
        if verbosity:
            note(f"opt_level {opt_level} of apex.amp is the policy {policy}, loss scale {scale or 'none'}")
        if verbosity > 1:
            note(handle.explain())
    else:
        call.attach(optimizer_list)
        call.num_losses = num_losses
        session.calls = [*(other for other in session.calls if other is not call), call]
    session.enabled = True
    return given


def _optimizers(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]


@contextlib.contextmanager
def scale_loss(
    loss: Tensor,
    optimizers: Any,
    loss_id: int = 0,
    model: nn.Module | None = None,
    delay_unscale: bool = False,
    delay_overflow_check: bool = False,
) -> Iterator[Tensor]:
    """Give the loss in float32, to be differentiated: its gradients are true right after ``backward()``.

    Args:
        loss: any shape.
        optimizers: those that will step with these gradients; ones that are not guarded yet are from now on.
        loss_id: from 0 to `num_losses` - 1; which loss `state_dict` reports the scale of its models for.
        model: nothing, as in Apex.
        delay_unscale: nothing; gradients are never scaled outside the models.
        delay_overflow_check: nothing; the step looks.

    Yields:
        The loss, not multiplied by anything.

    Raises:
        NotWrappedError: before `initialize`.
        PolicyError: the `loss_id` was not announced by `num_losses`.
    """
    session.note_loss(loss_id, _optimizers(optimizers))
    yield loss.float() if session.enabled else loss


def master_params(optimizer: Optimizer) -> Iterable[Tensor]:
    """The parameters of an optimizer, which are float32: for clipping.

    Args:
        optimizer: any.

    Yields:
        Each parameter.
    """
    for group in optimizer.param_groups:
        yield from group["params"]
