"""Refuses what would make training wrong: overflow nobody can act on, half-precision weights, writes that get lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from wrapprec import levels
from wrapprec.border import forget_raised
from wrapprec.bucket import Bucket
from wrapprec.dtypes import LOW, name
from wrapprec.errors import ModelChangedError, StepError, WrapprecWarning, message, module_label

if TYPE_CHECKING:
    from wrapprec.forward import Forward
    from wrapprec.scale import Scaler
    from wrapprec.state import Shared


def check_backwards(shared: Shared, scaler: Scaler) -> None:
    """Look, before a forward that trains, at what the backwards before have left.

    Raises:
        StepError: see `check_pending`.
    """
    forget_raised()
    with levels.plain():
        check_pending(shared)
        if scaler.touched and not any(owner.alive for owner in shared.owners):
            scaler.settle()


def check_pending(shared: Shared) -> None:
    """Raise for an overflow that no patched step could take notice of.

    Raises:
        StepError: gradients of a backward before held inf or nan and the weights were, or will be, stepped elsewhere.
    """
    orphans = [b for b in shared.pending() if not _alive(b) or b.changed()]
    if not orphans:
        return
    found = torch.stack([b.found for b in orphans if b.found is not None]).amax()
    for bucket in orphans:
        bucket.forget()
    if shared.backend.read(found)[0]:
        if shared.scaler is not None:
            shared.scaler.settle()
        raise StepError(
            message(
                "an optimizer whose step wrapprec can skip",
                "gradients with inf or nan, and an optimizer that wrapprec does not know (none was given to wrap, or it"
                " was rebuilt or copied since)",
                remedy="call handle.attach(optimizer) once it exists",
            )
        )


def _alive(bucket: Bucket) -> bool:
    return any(owner.alive for owner in bucket.owners)


def check_stored(forward: Forward, key: str, param: Tensor) -> None:
    """Refuse a parameter that was made low precision since `wrap`.

    Raises:
        ModelChangedError: see `check_dtype`.
    """
    problem = check_dtype(forward, key, param)
    if problem is not None:
        raise ModelChangedError(problem)


def check_dtype(forward: Forward, key: str, param: Tensor) -> str | None:
    """Say what is wrong with a parameter that is trained in a low precision it is not to have, or None."""
    if param.dtype not in LOW or not param.requires_grad or param.dtype is forward.stored_dtype:
        return None
    if forward.stored_dtype in LOW:
        return message(
            f"trainable parameters in {name(forward.stored_dtype)}, which they were converted to",
            f"{name(param.dtype)} parameter {key!r} of shape {tuple(param.shape)}",
            where=module_label(forward.name, forward.module),
            remedy="unwrap before you change dtypes, and wrap again with the policy of the new one",
        )
    if forward.shared.converted is not None and forward.shared.converted.dtypes:
        policy = "bf16-true" if param.dtype is torch.bfloat16 else "16-true"
        return message(
            f"trainable parameters in {name(forward.stored_dtype)}, in which the plan keeps those of this module",
            f"{name(param.dtype)} parameter {key!r} of shape {tuple(param.shape)}",
            where=module_label(forward.name, forward.module),
            remedy=f"unwrap before you change dtypes; rules=[({forward.name!r}, {policy!r})] stores this module in"
            f" {name(param.dtype)} too",
        )
    return message(
        "trainable parameters in float32 under a mixed policy",
        f"{name(param.dtype)} parameter {key!r} of shape {tuple(param.shape)}",
        where=module_label(forward.name, forward.module),
        remedy="call model.float() before the optimizer is built, or use the policy 'bf16-true'",
    )


def sharded_since(forward: Forward) -> str:
    """Say what is wrong with a model that FSDP was given after `wrap`."""
    return message(
        "a model that was sharded before it was wrapped",
        "one that fully_shard (or FullyShardedDataParallel, which is not supported) has changed since",
        where=module_label(forward.name, forward.module),
        remedy="call fully_shard first, then build the optimizer from model.parameters(), then call"
        " wrapprec.wrap(model, optimizer, policy)",
    )


def check_inputs(inputs: Iterable[tuple[Tensor, Tensor, int]], forward: Forward) -> None:
    """Refuse a write into an input that requires grad: the tensor that the caller holds would miss its gradient.

    Args:
        inputs: what was given, what forward got, and its version then.
        forward: of the module that opened the scope.

    Raises:
        ModelChangedError: forward wrote into one.
    """
    for given, inside, version in inputs:
        if inside._version != version:
            raise ModelChangedError(
                message(
                    "a model that leaves its inputs as they are, or inputs that require no gradient",
                    f"an input of shape {tuple(given.shape)} that requires grad and was modified in place in forward",
                    where=module_label(forward.name, forward.module),
                    remedy="pass a copy: model(x.clone())",
                )
            )


def check_weights(copies: Iterable[tuple[Forward, str, Tensor, int]]) -> None:
    """Refuse a write into a weight that was lent as a copy: it would be lost.

    Args:
        copies: by module and parameter name, what was lent, and its version then.

    Raises:
        ModelChangedError: forward wrote into one.
    """
    for forward, key, weight, version in copies:
        if version != (0 if weight.is_inference() else weight._version):
            raise ModelChangedError(
                message(
                    "a forward that does not change its weights",
                    f"parameter {key!r}, lent as a copy in {name(weight.dtype)}, that was modified in place, so that"
                    " the change would be lost",
                    where=module_label(forward.name, forward.module),
                    remedy=f'add rules=[Rule("{forward.name}", "float32")], or change the weight outside forward',
                )
            )


def version_of(tensor: Tensor) -> int:
    """How often a tensor was modified in place; 0 for an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def warn_of_autocast(forward: Forward) -> None:
    """Say once that the plan wins over the user's own autocast around the model."""
    if not torch._C._is_any_autocast_enabled():
        return
    shared = forward.shared
    device_type = shared.device.type
    if "autocast" in shared.warned or not torch.is_autocast_enabled(device_type):
        return
    dtype = torch.get_autocast_dtype(device_type)
    precision = shared.plan.policy.precision
    if precision.casting == "op" and precision.compute_dtype == dtype:
        return
    shared.warned.add("autocast")
    text = message(
        "a wrapped model to be called without torch.autocast around it",
        f"torch.autocast({device_type!r}, {dtype}) around a model wrapped with {shared.plan.policy}",
        where=module_label(forward.name, forward.module),
        remedy="take the autocast away; inside the model the plan decides",
    )
    warnings.warn(text, WrapprecWarning, stacklevel=6)


def warn_of_hooks(forward: Forward) -> None:
    """Say once that backward hooks inside the model work on gradients that are S times the true ones."""
    shared = forward.shared
    if "hooks" in shared.warned:
        return
    for below in forward.tree():
        module = below.module
        if module is not forward.module and (module._backward_hooks or module._backward_pre_hooks):
            shared.warned.add("hooks")
            text = message(
                "backward hooks on the wrapped model itself, its inputs, outputs or parameters",
                "a backward hook on a module inside it, where gradients are the loss scale times the true ones",
                where=module_label(below.name, module),
                remedy="divide by handle.scale in the hook, put it on the wrapped model or a parameter, or use a bf16"
                " policy, which needs no loss scale",
            )
            warnings.warn(text, WrapprecWarning, stacklevel=6)
            return


def warn_of_strangers(optimizer: Optimizer, known: set[int]) -> None:
    """Say that an optimizer steps parameters of no wrapped model.

    Args:
        optimizer: that is attached.
        known: the ids of the parameters of wrapped models.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [p for p in params if id(p) not in known]
    if strange:
        text = message(
            "an optimizer of the wrapped model's parameters",
            f"{type(optimizer).__name__} with {len(strange)} of {len(params)} parameters that no wrapped model owns"
            f", the first of shape {tuple(strange[0].shape)}",
            remedy="wrap the model that owns them too, or build the optimizer from model.parameters() after the"
            " model got its final parameters; they are trained as they are",
        )
        warnings.warn(text, WrapprecWarning, stacklevel=4)
