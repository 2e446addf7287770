"""The composition root: resolve a plan, install it, guard the optimizers, and hand out the handle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wrapprec.errors import NotWrappedError, message
from wrapprec.forward import Forward
from wrapprec.handle import Handle
from wrapprec.hold import check_scheduler
from wrapprec.install import adopt, install
from wrapprec.lowbit.keep import forget_rests
from wrapprec.lowbit.optimizer import check
from wrapprec.lowbit.quantised import release
from wrapprec.patch import beneath
from wrapprec.policy import Policy
from wrapprec.prepared import check_accelerators
from wrapprec.rule import Rule
from wrapprec.standin import forward_of
from wrapprec.state import Request, Shared
from wrapprec.undo import UndoStack


def wrap(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    policy: Policy | int | str | torch.dtype = "auto",
    *,
    rules: Iterable[Rule | tuple[Any, Any]] = (),
    loss_scale: Any = None,
    scheduler: Any = None,
    optimizer_bits: int | None = None,
    enabled: bool = True,
) -> Handle:
    """Make a plain training loop run in mixed precision.

    Everything the loop sees stays true-valued float32: outputs, losses, gradients, parameters, `state_dict`.

    Args:
        model: a module, or several (a GAN's); each gets its own loss scale.
        optimizer: one, several, or None for inference or a later `handle.attach`.
        policy: a preset (`bf16-mixed`, `16-mixed`, `bf16-module`, `32-true`, `nf4`, ...), a jmp string such as
            ``params=float32,compute=bfloat16``, a `Policy`, or `auto`: by device, with the reason in the plan.
        rules: further `Rule` objects, or ``(select, precision)`` pairs; the deepest matched module decides, then the
            last.
        loss_scale: None leaves it to the policy; a number is a static scale; ``"dynamic"``, ``"none"`` or a
            `LossScale`.
        scheduler: an LRScheduler, or several, held on skipped steps (one host read a step).
        optimizer_bits: 8 (bitsandbytes) or 4 (torchao): the optimizers, those attached later too, keep their state in
            so few bits; `unwrap` gives 32-bit state back.
        enabled: False returns a handle that does nothing, for scripts with a flag.

    Returns:
        The handle.

    Raises:
        PolicyError: the policy, a rule or the scale does not fit; nothing is changed then.
        AlreadyWrappedError: the model, or a part of it, is wrapped.
        WrapprecError: accelerate or DistributedDataParallel casts by itself.
        TypeError: model or optimizer is something else.
        ValueError: the scheduler belongs to none of the optimizers.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = wrap(model, optimizer, "bf16-mixed")
    >>> model(torch.ones(1, 4)).dtype, model.weight.dtype
    (torch.float32, torch.float32)
    >>> handle.unwrap()
    """
    models = _sequence(model, nn.Module, "model")
    optimizers = [] if optimizer is None else [beneath(one) for one in _sequence(optimizer, Optimizer, "optimizer")]
    schedulers = [] if scheduler is None else _list(scheduler)
    for one_scheduler in schedulers:
        check_scheduler(one_scheduler, optimizers)
    if not enabled:
        return Handle([], UndoStack())
    check_accelerators()
    for one_optimizer in optimizers:
        check(one_optimizer, optimizer_bits)
    request = Request(policy, tuple(rules), loss_scale)
    undo = UndoStack()
    installed: list[Shared] = []
    try:
        for one in models:
            shared = install(one, request, undo, installed, optimizers)
            shared.undo = undo
            installed.append(shared)
        handle = Handle(installed, undo, optimizer_bits)
        if not optimizers:
            forget_rests(installed)
        for one_optimizer in optimizers:
            mine = [s for s in schedulers if beneath(getattr(s, "optimizer", one_optimizer)) is one_optimizer]
            handle.attach(one_optimizer)
            for one_scheduler in mine:
                handle.attach(one_optimizer, one_scheduler)
    except BaseException:
        undo.undo()
        raise
    # Last: rounding cannot be taken back.
    handle.quantise()
    for one in models:
        release(one)
    return handle


def unwrap(model: nn.Module) -> None:
    """Take `wrap` back, for who lost the handle; also for a copy of a wrapped model.

    Args:
        model: a wrapped model, or any part of it: the whole call of `wrap` is undone.

    Raises:
        NotWrappedError: it is not wrapped.

    >>> model = nn.Linear(4, 2)
    >>> handle = wrap(model, policy="bf16-mixed")
    >>> unwrap(model)
    >>> handle_of(model) is None
    True
    """
    handle = handle_of(model)
    if handle is None:
        raise NotWrappedError(
            message(
                "a wrapped model",
                f"a {type(model).__name__} that is not wrapped",
                remedy="call wrapprec.wrap(model, optimizer, policy) first",
            )
        )
    handle.unwrap()


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a wrapped model, or None.

    Args:
        model: a wrapped model, a part of it, a copy of it, or a module around it (DDP).

    >>> handle_of(nn.Linear(4, 2)) is None
    True
    """
    for module in model.modules():
        forward = forward_of(module)
        if isinstance(forward, Forward):
            shared = forward.shared
            if shared.handle is None:
                shared.undo = adopt(module)
                return Handle([shared], shared.undo)
            found: Handle = shared.handle
            return found
    return None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _sequence(value: Any, kind: type, what: str) -> list[Any]:
    values = [value] if isinstance(value, kind) else list(value) if isinstance(value, (list, tuple)) else [value]
    for one in values:
        if not isinstance(one, kind):
            raise TypeError(
                message(
                    f"{what} to be a {'torch.nn.Module' if kind is nn.Module else 'torch.optim.Optimizer'},"
                    " or a sequence of them",
                    f"{one!r} (of type {type(one).__name__})",
                    remedy=f"wrap(model, optimizer, policy) takes the {what} object itself",
                )
            )
    if not values:
        raise TypeError(message(f"at least one {what}", "an empty sequence", remedy="leave it out"))
    return values
