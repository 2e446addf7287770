"""What is saved and loaded beside the model's and the optimizer's own state: the loss scales."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from wrapprec.errors import PolicyError, WrapprecWarning, message
from wrapprec.state import Shared

if TYPE_CHECKING:
    from wrapprec.backends.base import Backend


def load_scales(models: Sequence[Shared], state: dict[str, Any]) -> None:
    """Give every model its loss scale back; all of them, or none.

    Args:
        models: in the order in which they were saved.
        state: of `Handle.state_dict`, or of ``torch.amp.GradScaler.state_dict`` for all models alike.

    Raises:
        PolicyError: the state is neither, or of another number of models.
    """
    scales = state.get("scales", [state] * len(models))
    if not scales or not state:  # saved while not enabled; a disabled GradScaler's
        scales = [None] * len(models)
    if len(scales) != len(models):
        raise PolicyError(
            message(
                f"the state of {len(models)} models",
                f"a state of {len(scales)}",
                remedy="wrap the same models, in the same order, as when it was saved",
            )
        )
    pairs = zip((model.scaler for model in models), scales, strict=True)
    loads = [(scaler, scale) for scaler, scale in pairs if scaler is not None and scale is not None]
    before = [scaler.state_dict() for scaler, _ in loads]
    try:
        for scaler, scale in loads:
            scaler.load_state_dict(scale)
    except PolicyError:
        for (scaler, _), scale in zip(loads, before, strict=True):
            scaler.load_state_dict(scale)
        raise
    for model in models:
        model.be_patient()
        model.schedule.restart()


class Restored:
    """Whether an optimizer's state was loaded, and the loss scale with it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._optimizer_loaded = False
        self.scale_loaded = False

    def note(self, optimizer: Optimizer) -> None:
        """The optimizer's state was loaded."""
        # Adagrad has a state before its first step, and accelerate loads every optimizer's own state into it.
        steps = [state.get("step", state.get("n_iter", 1)) for state in optimizer.state.values() if state]
        on_device = self._backend.read(*(step for step in steps if isinstance(step, Tensor)))
        self._optimizer_loaded = any(on_device) or any(step for step in steps if not isinstance(step, Tensor))

    def check(self, stacklevel: int) -> None:
        """A step is about to be taken: warn, once, if the optimizer's state was loaded alone."""
        forgotten = self._optimizer_loaded and not self.scale_loaded
        self._optimizer_loaded = self.scale_loaded = False
        if forgotten:
            text = message(
                "the loss scale to be restored together with the optimizer's state",
                "optimizer.load_state_dict(...) alone; the loss scale starts anew",
                remedy="save handle.state_dict() too, and call handle.load_state_dict(...) when resuming",
            )
            warnings.warn(text, WrapprecWarning, stacklevel=stacklevel + 1)
