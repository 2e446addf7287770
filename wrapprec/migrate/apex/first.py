"""Apex's first API, which it gave up in 2019: `amp.init`, whose handle is told optimizers and losses, never models.

The models are found as `wrapprec run` finds them: each at its first training forward, with the optimizers that have
its parameters.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from wrapprec.errors import WrapprecError, message
from wrapprec.migrate.apex.notes import note
from wrapprec.migrate.apex.options import build_scale, read_options
from wrapprec.migrate.find import Finder
from wrapprec.policy import Policy

__all__ = ["AmpHandle", "NoOpHandle", "OptimWrapper", "init"]


class NoOpHandle:
    """What `init(enabled=False)` gives: everything is left as it is."""

    def is_active(self) -> bool:
        """Whether models are wrapped."""
        return False

    @contextlib.contextmanager
    def scale_loss(self, loss: Tensor, optimizer: Any) -> Iterator[Tensor]:
        """Give the loss, to be differentiated."""
        yield loss

    def wrap_optimizer(self, optimizer: Any, num_loss: int = 1) -> Any:
        """Give the optimizer a `scale_loss` of its own."""
        return OptimWrapper(optimizer, self)

    def _clear_cache(self) -> None:
        pass

    def _deactivate(self) -> None:
        pass


class AmpHandle(NoOpHandle):
    """What `init` gives.

    Args:
        finder: which wraps the models.
    """

    def __init__(self, finder: Finder) -> None:
        self._finder = finder

    def is_active(self) -> bool:
        """Whether models are wrapped."""
        return True

    @contextlib.contextmanager
    def scale_loss(self, loss: Tensor, optimizer: Any) -> Iterator[Tensor]:
        """Give the loss in float32, not multiplied by anything: its gradients are true after ``backward()``.

        Args:
            loss: any shape.
            optimizer: which will step.

        Yields:
            The loss.
        """
        yield loss.float()

    def _deactivate(self) -> None:
        """Look for no more models; those that were found stay wrapped."""
        self._finder.remove()


class OptimWrapper:
    """An optimizer with `scale_loss`; everything else is the optimizer's own.

    Args:
        optimizer: any.
        handle: whose `scale_loss`.
    """

    def __init__(self, optimizer: Optimizer, handle: NoOpHandle) -> None:
        self.__dict__.update(_optimizer=optimizer, _handle=handle)

    @property  # type: ignore[misc]  # `object` has it as an attribute; schedulers ask whether this is an optimizer
    def __class__(self) -> Any:
        return type(self.__dict__["_optimizer"])

    def scale_loss(self, loss: Tensor) -> Any:
        """Give the loss, to be differentiated, as `amp.scale_loss` does; a context manager."""
        return self.__dict__["_handle"].scale_loss(loss, self.__dict__["_optimizer"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_optimizer"], name, value)


def init(
    enabled: bool = True,
    loss_scale: Any = "dynamic",
    enable_caching: bool = True,
    verbose: bool = False,
    allow_banned: bool = False,
) -> Any:
    """Train every model from now on as `initialize(opt_level="O1")` does, once a loop calls it.

    Args:
        enabled: False gives a handle that does nothing.
        loss_scale: `dynamic`, or a number.
        enable_caching: nothing.
        verbose: nothing.
        allow_banned: nothing.

    Returns:
        The handle: `scale_loss(loss, optimizer)`, `wrap_optimizer(optimizer)`.

    Raises:
        WrapprecError: it was called before; two of them would wrap the same models.
        PolicyError: the loss scale is no number.
    """
    if not enabled:
        return NoOpHandle()
    if _active and _active[0]._finder.is_installed:
        remedy = "call amp.init once, and keep its handle"
        raise WrapprecError(message("one amp.init in a process", "another one", remedy=remedy))
    options = read_options("O1", {"loss_scale": loss_scale})
    scale = build_scale(options, None, None)
    policy = replace(Policy.parse(options.policy()), loss_scale=scale)
    finder = Finder(policy, note)
    finder.install()
    for optimizer in [one for one in gc.get_objects() if issubclass(type(one), Optimizer)]:
        finder.expect(optimizer)
    note(f"amp.init of apex: models are wrapped at their first training forward, with the policy {policy}")
    _active[:] = [AmpHandle(finder)]
    return _active[0]


_active: list[AmpHandle] = []
