"""The loss scale as device state, and the rule that updates it.

Nothing here reads a tensor on the host: the update is arithmetic on the device, and every update makes new tensors,
so a border that captured the scale in forward keeps the value it was built with.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from wrapprec.errors import PolicyError, message
from wrapprec.policy import LossScale


class Scaler:
    """The loss scale of one wrapped model.

    `update` is GradScaler's rule (Micikevicius et al. 2018, section 3.2) with a lower bound and hysteresis: after an
    overflow ``scale = max(scale * backoff_factor, min_scale)``; after `growth_interval` good steps in a row
    ``scale = min(scale * growth_factor, max_scale)``.
    """

    def __init__(self, config: LossScale, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.scale = torch.full((), config.init_scale, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros((), device=device)
        self.hysteresis = torch.full((), float(config.hysteresis), device=device)
        # Overflows in a row at the lowest scale: what `NonFiniteError` counts.
        self.consecutive = torch.zeros((), device=device)
        # Overflow seen in backward since the last update; written in place, by compiled graphs too.
        self.seen = torch.zeros((), device=device)
        # The border through which each running backward came inside, by graph task: what a recomputation must use.
        self.borders: dict[int, Any] = {}
        # A backward came since the last update; the scale changes at most once between two backwards.
        self.touched = True
        # 1.0 when another model's step lowered this scale since this model's last backward.
        self.lowered = torch.zeros((), device=device)
        self.task = -1
        # The models that took part in the last backward with this one.
        self.peers: weakref.WeakSet[Scaler] = weakref.WeakSet()

    def begin(self, task: int, peers: weakref.WeakSet[Scaler]) -> None:
        """A backward, known by its graph task, has come inside; `peers` are all models it came through so far."""
        self.touched = True
        if task != self.task:
            self.task = task
            self.lowered = torch.zeros_like(self.lowered)
        peers.add(self)
        self.peers = peers

    def update(self, found: Tensor, skipped: Tensor) -> None:
        """Back off if `found`, else count a good step; both are 0.0 or 1.0, float32, shape () on the device.

        Args:
            found: this model saw inf or nan since its last update.
            skipped: the step did not happen; a step skipped for another model's sake counts for nothing.
        """
        config = self.config
        self.touched = False
        overflow = torch.maximum(torch.maximum(found.to(self.device), self.seen), self.lowered) > 0
        done = self.lowered > 0
        self.seen.zero_()
        self.lowered = torch.zeros_like(self.lowered)
        lowest = torch.ones_like(overflow) if not config.dynamic else self.scale <= config.min_scale
        self.consecutive = torch.where(overflow & lowest, self.consecutive + 1, torch.where(overflow, self.consecutive, 0.0))
        if not config.dynamic:
            return
        good = ~overflow & (skipped.to(self.device) == 0)
        tracker = torch.where(overflow, 0.0, self.growth_tracker + good)
        hysteresis = torch.where(overflow, self.hysteresis - 1, self.hysteresis)
        back_off = overflow & (hysteresis <= 0) & ~done
        grow = good & (tracker >= config.growth_interval)
        lowered = (self.scale * config.backoff_factor).clamp(min=config.min_scale)
        raised = (self.scale * config.growth_factor).clamp(max=config.max_scale)
        self.scale = torch.where(back_off, lowered, torch.where(grow, raised, self.scale))
        self.growth_tracker = torch.where(grow, 0.0, tracker)
        self.hysteresis = torch.where(back_off | grow, float(config.hysteresis), hysteresis)

    def lower(self) -> None:
        """Back off for an overflow seen in backward although another model's optimizer steps; counts no step."""
        if self.touched:
            lowered = torch.maximum(self.lowered, self.seen)
            self.update(self.seen, torch.ones_like(self.seen))
            self.lowered = lowered
            self.touched = True

    def settle(self) -> None:
        """Count a backward where no optimizer will ever step: back off for its overflow, or count it as good."""
        if self.touched:
            self.update(self.seen, self.seen.clone())

    def owe(self, found: Tensor) -> None:
        """Remember an overflow that was found after this backward's update: it is due at the next."""
        self.seen = torch.maximum(self.seen, found.to(self.device))

    def to(self, device: torch.device) -> None:
        """Move the state to `device`; called when the model moved."""
        self.device = device
        for name in ("scale", "growth_tracker", "hysteresis", "consecutive", "seen", "lowered"):
            setattr(self, name, getattr(self, name).to(device))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, loadable with ``torch.load(weights_only=True)``."""
        numbers = torch.stack([self.scale, self.growth_tracker, self.hysteresis, self.consecutive, self.seen]).tolist()
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
        if "_growth_tracker" in state:
            names = ("growth_factor", "backoff_factor", "growth_interval")
            changes = {name: state[name] for name in names if name in state}
        else:
            changes = dict(state["config"])
        # A checkpoint's scale may lie outside today's bounds: the bounds give way, the run goes on as it was.
        bounds = {"min_scale": min(self.config.min_scale, state["scale"]), "max_scale": max(self.config.max_scale, state["scale"])}
        self.config = dataclasses.replace(self.config, **{**bounds, "init_scale": state["scale"], **changes})
        numbers = {
            "scale": state["scale"],
            "growth_tracker": state.get("growth_tracker", state.get("_growth_tracker", 0)),
            "hysteresis": state.get("hysteresis", self.config.hysteresis),
            "consecutive": state.get("consecutive", 0),
            "seen": state.get("seen", False),
        }
        for name, number in numbers.items():
            setattr(self, name, torch.full((), float(number), device=self.device))
        self.touched = bool(numbers["seen"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "borders": {}, "peers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.peers = weakref.WeakSet()
