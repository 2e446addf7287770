"""Saves and loads loss scales in the form of Apex's checkpoints; and what scripts read off `_amp_state`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from wrapprec.errors import PolicyError, message
from wrapprec.handle import Handle
from wrapprec.migrate.apex.notes import note
from wrapprec.migrate.apex.session import Call, session

_OURS = "wrapprec"
"""The entry beside Apex's, which resumes each model bit for bit."""


def state_dict(destination: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything a resumed run needs beside the model's and the optimizer's state.

    Args:
        destination: a dictionary to fill.

    Returns:
        `loss_scaler0`, `loss_scaler1`, ..., one a loss as in Apex, each with `loss_scale`, the smallest among the
        models that the loss trains, and `unskipped`; and our own entry. Plain numbers: loads with ``weights_only``.

    Raises:
        NotWrappedError: before `initialize`.
    """
    state: dict[str, Any] = OrderedDict() if destination is None else destination
    call = session.latest("amp.state_dict")
    if call is None:
        return state
    for loss_id in range(call.num_losses):
        scale, unskipped = _standing(call, loss_id)
        state[f"loss_scaler{loss_id}"] = {"loss_scale": scale, "unskipped": unskipped}
    state[_OURS] = [known.handle.state_dict() for known in session.calls]
    return state


def _standing(call: Call, loss_id: int) -> tuple[float, int]:
    """The scale of a loss, and good steps since it changed: those of the model with the smallest scale."""
    optimizers = list(call.losses.get(loss_id, ()))
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = [m for m in call.handle._models if any(id(p) in stepped for p in m.parameters())]
    states = [m.scaler.state_dict() for m in trained or call.handle._models if m.scaler is not None]
    return min(((s["scale"], s["growth_tracker"]) for s in states), default=(1.0, 0))


def load_state_dict(state_dict: dict[str, Any]) -> None:
    """Resume, from a checkpoint of this module or of Apex.

    Where several losses had scales of their own in Apex, every model starts from the smallest.

    Args:
        state_dict: what `state_dict` gave, here or in Apex.

    Raises:
        NotWrappedError: before `initialize`.
        PolicyError: it is something else.
    """
    if session.latest("amp.load_state_dict") is None:
        return
    mine, theirs = _parse(dict(state_dict))
    # From the latest: earlier calls may have been for models that have been dropped since.
    pairs = list(zip(reversed(session.calls), reversed(mine), strict=False))
    if mine and all(_count(call.handle) == len(state.get("scales", ())) for call, state in pairs):
        for call, state in pairs:
            call.handle.load_state_dict(state)
        return
    if mine:
        note("amp.load_state_dict: saved for other models; every model resumes from the smallest loss scale")
    if theirs:
        scale, unskipped = min(theirs)
        for call in session.calls:
            call.handle.load_state_dict({"scale": scale, "_growth_tracker": unskipped})


def _count(handle: Handle) -> int:
    return len(handle._models)


def _parse(state: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[float, int]]]:
    """Our own entry, and Apex's pairs of scale and good steps since it changed."""
    mine = state.pop(_OURS, [])
    try:
        if any(not key.startswith("loss_scaler") for key in state):
            raise KeyError(next(key for key in state if not key.startswith("loss_scaler")))
        return mine, [(float(entry["loss_scale"]), int(entry["unskipped"])) for entry in state.values()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PolicyError(
            message(
                "the state of amp.state_dict(): loss_scaler0, ... with loss_scale and unskipped",
                f"a dict with keys {list(state)}; {error!r}",
                remedy="save amp.state_dict() next to the model's and the optimizer's state",
            )
        ) from error


class _LossScaler:
    """One entry of `_amp_state.loss_scalers`, to be read."""

    def __init__(self, call: Call, loss_id: int) -> None:
        self._standing = call, loss_id
        self.dynamic = call.options.loss_scale == "dynamic"

    def loss_scale(self) -> float:
        return _standing(*self._standing)[0]

    _loss_scale = property(loss_scale)

    @property
    def _unskipped(self) -> int:
        return _standing(*self._standing)[1]


class AmpState:
    """What scripts read of Apex's own state, to log the loss scale."""

    @property
    def opt_properties(self) -> Any:
        """The options of the latest `initialize`, or None."""
        call = session.latest("amp._amp_state.opt_properties")
        return None if call is None else call.options

    @property
    def loss_scalers(self) -> list[_LossScaler]:
        """One for each loss; ``loss_scale()`` reads the device."""
        call = session.latest("amp._amp_state.loss_scalers")
        return [] if call is None else [_LossScaler(call, loss_id) for loss_id in range(call.num_losses)]
