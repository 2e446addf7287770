"""The loss scale as device state, and the rule that updates it.

The update reads nothing on the host: it is arithmetic on the device, and every update makes a new tensor of the scale,
so a border that captured the scale in forward keeps the value it was built with.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from wrapprec import levels
from wrapprec.errors import PolicyError, message
from wrapprec.policy import LossScale

_STATE = ("scale", "growth_tracker", "hysteresis", "consecutive", "counted")

_LARGEST = 2.0**126
"""Of which the reciprocal is still a normal float32."""

_CAUTIOUS = 2.0**10
"""The largest scale under a transform: gradients at the outputs from 2**-24 to 2**5 are float16's normal numbers."""


class Scaler:
    """The loss scale of one wrapped model.

    `update` is GradScaler's rule (Micikevicius et al. 2018, section 3.2) with bounds, and Apex's hysteresis: at the
    `hysteresis`-th overflow in a row, and at every one that follows it,
    ``scale = max(scale * backoff_factor, min_scale)``; after `growth_interval` good steps in a row
    ``scale = min(scale * growth_factor, max_scale)``.
    """

    def __init__(self, config: LossScale, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.scale = torch.full((), min(config.init_scale, _LARGEST), dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.float32, device=device)
        self.hysteresis = torch.full((), float(config.hysteresis), dtype=torch.float32, device=device)
        # Overflows in a row at the lowest scale: what `NonFiniteError` counts.
        self.consecutive = torch.zeros((), dtype=torch.float32, device=device)
        # Overflow seen in backward and not counted yet. One tensor for good: compiled graphs write it in place.
        self.seen = torch.zeros((), dtype=torch.float32, device=device)
        # 1.0 when an overflow of the running or latest backward has been counted: it is counted once.
        self.counted = torch.zeros((), dtype=torch.float32, device=device)
        # The border through which each running backward came inside, by graph task: what a recomputation must use.
        self.borders: dict[int, Any] = {}
        # A backward came since the last update; the scale changes at most once between two backwards.
        self.touched = False
        # It said so by `begin`; backwards of compiled graphs do not.
        self.begun = False
        # A patched step has judged the latest backward, this model's own or another's that it was part of.
        self.judged = False
        self.task = -1
        # `cautious`, and the scale that it was made from.
        self._cautious: tuple[Tensor, Tensor] | None = None
        # The models that took part in backwards with this one since the last update.
        self.peers: weakref.WeakSet[Scaler] = weakref.WeakSet()

    @property
    def answered(self) -> bool:
        """A patched step, of this model or of one behind which it ran, has judged the latest backward."""
        return self.judged and (self.begun or not self.touched)

    def cautious(self) -> Tensor:
        """The scale for a transform of torch.func, whose gradients no step skips: 1.0 at an output must fit float16.

        With the usual first scale of 2**16 every Jacobian would be inf.
        """
        if self._cautious is None or self._cautious[0] is not self.scale:
            with levels.plain():
                self._cautious = self.scale, self.scale.clamp(max=_CAUTIOUS)
        return self._cautious[1]

    def begin(self, task: int, peers: weakref.WeakSet[Scaler]) -> None:
        """A backward, known by its graph task, has come inside; `peers` are all models it came through so far."""
        if task != self.task:
            self.task = task
            # What an earlier backward saw after its overflow had been counted (a step taken inside backward) is the
            # same overflow.
            self.seen.mul_(1.0 - self.counted)
            self.counted = torch.zeros_like(self.counted)
            self.touched = self.begun = True
            self.judged = False
        for peer in peers:
            peer.peers.add(self)
            self.peers.add(peer)
        peers.add(self)

    def update(self, found: Tensor, skipped: Tensor) -> None:
        """Back off if `found`, else count a good step; both are 0.0 or 1.0, float32, shape () on the device.

        Args:
            found: this model saw inf or nan since its last update.
            skipped: the step did not happen; a step skipped for another model's sake counts for nothing.
        """
        if not self.begun:
            self.counted = torch.zeros_like(self.counted)
        self._count(found, skipped)
        self.touched = self.begun = False
        self.peers = weakref.WeakSet()

    def update_where(self, there: Tensor, found: Tensor, skipped: Tensor, owed: Tensor) -> None:
        """`update` for a backward that other ranks alone may have had, so that their scales stay equal to this one.

        Args:
            there: 1.0 where some rank had a backward, float32, shape (); where none had, `owed` is what `owe` takes.
        """
        before = {name: getattr(self, name) for name in _STATE}
        seen = torch.maximum(self.seen, owed.to(self.device))
        self.update(found, skipped)
        for name, value in before.items():
            setattr(self, name, torch.where(there > 0, getattr(self, name), value))
        self.seen.copy_(torch.where(there > 0, self.seen, seen))

    def standing(self, elsewhere: Tensor | None = None) -> Tensor:
        """What ranks agree on by taking the largest of each: the lowest scale, and what any of them saw.

        Args:
            elsewhere: what `stand_at` returned for another group of ranks; it holds for this one too.
        """
        lowest = torch.stack([self.scale, self.growth_tracker, self.hysteresis]).neg()
        touched = torch.full((), float(self.touched), dtype=torch.float32, device=self.device)
        touched = touched if elsewhere is None else torch.maximum(touched, elsewhere.to(touched))
        return torch.cat([lowest, torch.stack([self.consecutive, self.seen, touched])])

    def stand_at(self, standing: Tensor) -> Tensor:
        """Take over what the ranks agreed on.

        Returns:
            1.0 where some rank was touched by a backward; float32, shape ().
        """
        self.scale, self.growth_tracker, self.hysteresis = standing[:3].neg().unbind()
        self.consecutive = standing[3]
        self.seen.copy_(standing[4])
        return standing[5]

    def _count(self, found: Tensor, skipped: Tensor) -> None:
        config = self.config
        overflow = torch.maximum(found.to(self.device), self.seen) > 0
        fresh = overflow & (self.counted == 0)
        good = ~overflow & (self.counted == 0) & (skipped.to(self.device) == 0)
        self.seen.zero_()
        self.counted = torch.where(overflow, 1.0, self.counted)
        self.judged = True
        lowest = torch.ones_like(overflow) if not config.dynamic else self.scale <= config.min_scale
        self.consecutive = torch.where(fresh & lowest, self.consecutive + 1, torch.where(good, 0.0, self.consecutive))
        if not config.dynamic:
            return
        tracker = torch.where(overflow, 0.0, self.growth_tracker + good)
        hysteresis = torch.where(fresh, (self.hysteresis - 1).clamp(min=0), self.hysteresis)
        grow = good & (tracker >= config.growth_interval)
        lowered = (self.scale * config.backoff_factor).clamp(min=config.min_scale)
        raised = (self.scale * config.growth_factor).clamp(max=min(config.max_scale, _LARGEST))
        self.scale = torch.where(fresh & (hysteresis <= 0), lowered, torch.where(grow, raised, self.scale))
        self.growth_tracker = torch.where(grow, 0.0, tracker)
        self.hysteresis = torch.where(good, float(config.hysteresis), hysteresis)

    def lower(self) -> None:
        """Back off for an overflow seen in backward although another model's optimizer steps; counts no step."""
        if self.touched:
            if not self.begun:
                self.begun, self.counted = True, torch.zeros_like(self.counted)
            self._count(self.seen, torch.ones_like(self.seen))

    def settle(self) -> None:
        """Count a backward where no optimizer will ever step: back off for its overflow, or count it as good."""
        if self.touched:
            # At once, for other threads that settle.
            self.touched = False
            self.update(self.seen, torch.zeros_like(self.seen))

    def owe(self, found: Tensor) -> None:
        """Remember an overflow that was found after this backward's update: it is due at the next."""
        torch.maximum(self.seen, found.to(self.device), out=self.seen)

    def to(self, device: torch.device) -> None:
        """Move the state to `device`; called when the model moved."""
        self.device = device
        for name in ("scale", "growth_tracker", "hysteresis", "consecutive", "seen", "counted"):
            setattr(self, name, getattr(self, name).to(device))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, loadable with ``torch.load(weights_only=True)``."""
        due = self.seen * (1.0 - self.counted)
        numbers = torch.stack([self.scale, self.growth_tracker, self.hysteresis, self.consecutive, due]).tolist()
        scale, tracker, hysteresis, consecutive, seen = numbers
        return {
            "scale": scale,
            "growth_tracker": int(tracker),
            "hysteresis": int(hysteresis),
            "consecutive": int(consecutive),
            "seen": bool(seen),
            "config": dataclasses.asdict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of `state_dict` or of ``torch.amp.GradScaler.state_dict``.

        Raises:
            PolicyError: the dictionary is neither.
        """
        if "scale" not in state or not {"growth_tracker", "_growth_tracker"} & state.keys():
            raise PolicyError(
                message(
                    "the state of a loss scale, from handle.state_dict() or torch.amp.GradScaler.state_dict()",
                    f"a dict with keys {sorted(state)}",
                    remedy="save handle.state_dict() next to the model's and the optimizer's state",
                )
            )
        try:
            self._resume(state)
        except (TypeError, ValueError) as error:  # a PolicyError is a ValueError
            raise PolicyError(
                message(
                    "the state of a loss scale, from handle.state_dict() or torch.amp.GradScaler.state_dict()",
                    f"{state!r}: {error}",
                    remedy="resume from a checkpoint that is whole",
                )
            ) from error

    def _resume(self, state: dict[str, Any]) -> None:
        if "_growth_tracker" in state:
            names = ("growth_factor", "backoff_factor", "growth_interval")
            changes = {name: state[name] for name in names if name in state}
        else:
            known = {field.name for field in dataclasses.fields(LossScale)}
            changes = {name: value for name, value in state.get("config", {}).items() if name in known}
        # A checkpoint's scale may lie outside today's bounds: the bounds give way, the run goes on as it was.
        low = min(changes.get("min_scale", self.config.min_scale), state["scale"])
        high = max(changes.get("max_scale", self.config.max_scale), state["scale"])
        changes = {"init_scale": state["scale"], **changes, "min_scale": low, "max_scale": high}
        config = dataclasses.replace(self.config, **changes)
        numbers = {
            "scale": float(state["scale"]),
            "growth_tracker": float(state.get("growth_tracker", state.get("_growth_tracker", 0))),
            "hysteresis": float(state.get("hysteresis", config.hysteresis)),
            "consecutive": float(state.get("consecutive", 0)),
            "seen": float(state.get("seen", False)),
            "counted": 0.0,
        }
        self.config = config
        for name, number in numbers.items():
            setattr(self, name, torch.full((), number, dtype=torch.float32, device=self.device))
        self.touched = self.begun = self.judged = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "borders": {}, "peers": None, "_cautious": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.peers = weakref.WeakSet()
