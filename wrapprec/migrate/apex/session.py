"""What `amp.initialize` leaves behind: the handles, and which of their models each loss trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from wrapprec.errors import AlreadyWrappedError, NotWrappedError, PolicyError, message
from wrapprec.handle import Handle
from wrapprec.migrate.apex.options import Options


@dataclass(eq=False)
class Call:
    """One call of `initialize`.

    Args:
        handle: what `wrap` gave.
        request: what it was asked for, to be compared with that of a later call.
        options: the same in Apex's words.
        num_losses: how many losses the script announced.
        attached: the optimizers that are guarded.
        losses: by loss id, the optimizers that it was last scaled for.
    """

    handle: Handle
    request: tuple[Any, ...]
    options: Options
    num_losses: int
    attached: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    losses: dict[int, weakref.WeakSet[Optimizer]] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Its models are wrapped, and not all of them were dropped."""
        return any(model.root is not None and model.root() is not None for model in self.handle._models)

    def models(self) -> list[nn.Module]:
        """The models that were wrapped."""
        return [root for m in self.handle._models if m.root is not None and (root := m.root()) is not None]

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Guard the optimizers that are not guarded yet.

        Raises:
            TypeError: one is no torch.optim.Optimizer.
        """
        for optimizer in optimizers:
            if optimizer not in self.attached:
                self.handle.attach(optimizer)
                self.attached.add(optimizer)

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether a parameter of a model of this call is stepped by `optimizer`."""
        mine = {id(param) for model in self.handle._models for param in model.parameters()}
        return any(id(param) in mine for group in optimizer.param_groups for param in group["params"])


@dataclass(eq=False)
class Session:
    """Every call of `initialize` in this process; as in Apex, there is one of these.

    Args:
        calls: those whose models live, the latest last.
        enabled: what the latest call said; None before any.
    """

    calls: list[Call] = field(default_factory=list)
    enabled: bool | None = None

    def live(self) -> list[Call]:
        """The calls whose models are still wrapped."""
        self.calls = [call for call in self.calls if call.alive]
        return self.calls

    def latest(self, what: str) -> Call | None:
        """The latest call; None where that was not enabled.

        Raises:
            NotWrappedError: there is none.
        """
        if self.enabled is False:
            return None
        if not self.live():
            raise NotWrappedError(
                message(
                    f"amp.initialize before {what}",
                    "no model that amp.initialize was given, or none that lives",
                    remedy="call model, optimizer = amp.initialize(model, optimizer, opt_level=...) first",
                )
            )
        return self.calls[-1]

    def known(self, models: Sequence[nn.Module], request: tuple[Any, ...]) -> Call | None:
        """The earlier call for the same models.

        Raises:
            AlreadyWrappedError: it asked for something else, or for some of these models only.
        """
        for call in self.live():
            before = call.models()
            same = [any(model is other for other in before) for model in models]
            if not any(same):
                continue
            if all(same) and len(before) == len(models) and call.request == request:
                return call
            raise AlreadyWrappedError(
                message(
                    "amp.initialize once for a model, or again with the same models and options and another optimizer",
                    "another call for the same model, with other models or options",
                    remedy="call wrapprec.unwrap(model) before, or initialize all models in one call",
                )
            )
        return None

    def note_loss(self, loss_id: int, optimizers: list[Optimizer]) -> None:
        """A loss is about to be differentiated for `optimizers`; those made after `initialize` are guarded from now on.

        Raises:
            PolicyError: the loss was not announced.
        """
        call = self.latest("amp.scale_loss")
        if call is None:
            return
        if not 0 <= loss_id < call.num_losses:
            received = f"loss_id={loss_id!r} with num_losses={call.num_losses}"
            remedy = "give amp.initialize the number of losses: num_losses=..."
            raise PolicyError(message("a loss_id from 0 to num_losses - 1", received, remedy=remedy))
        call.losses[loss_id] = weakref.WeakSet(optimizers)
        for optimizer in optimizers:
            if not any(optimizer in mine.attached for mine in self.calls):
                for mine in [mine for mine in self.calls if mine.owns(optimizer)] or [call]:
                    mine.attach([optimizer])


session = Session()
"""What `amp` works on."""
