"""What `wrap` returns: the plan, the scale, saving and resuming, and the way back."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from wrapprec.checks import warn_of_strangers
from wrapprec.current import thread
from wrapprec.errors import WrapprecError, message
from wrapprec.hold import check_scheduler
from wrapprec.lowbit.attach import follow_dtypes, keep_updates
from wrapprec.lowbit.keep import load_kept, save_kept
from wrapprec.lowbit.optimizer import LowBits, check, convert, embedded
from wrapprec.lowbit.quantised import check_attached, originals
from wrapprec.lowbit.rounding import Rounder
from wrapprec.patch import beneath
from wrapprec.plan import Plan
from wrapprec.policy import Policy
from wrapprec.prepared import follow
from wrapprec.resume import load_scales
from wrapprec.standin import take_away
from wrapprec.state import Shared
from wrapprec.step import Stepper, inner_optimizers
from wrapprec.undo import UndoStack

T = TypeVar("T")

_freezing = threading.Lock()
"""Held while `frozen()` is entered or left: contexts on several threads end in any order."""


class Handle:
    """A wrapped model (or several, with one call) and its optimizers.

    As a context manager it unwraps on exit. Built by `wrapprec.wrap`; found again by `wrapprec.handle_of`.
    """

    def __init__(self, models: list[Shared], undo: UndoStack, optimizer_bits: int | None = None) -> None:
        self._models = models
        self._undo = undo
        self._optimizer_bits = optimizer_bits
        self._low: list[LowBits] = []
        self._steppers: list[Stepper] = []
        self._rounders: list[Rounder] = []
        # Those of which it is known when an Accelerator prepares them.
        self._followed: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._skipped_before = 0
        self._loaded = False
        for model in models:
            model.handle = self

    # The plan

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One plan a model, in the order given to `wrap`."""
        return tuple(model.plan for model in self._models)

    @property
    def plan(self) -> Plan:
        """The plan of the only model.

        Raises:
            WrapprecError: there are several models, or none because wrapping was not enabled.
        """
        return self._only("plan", self.plans)

    @property
    def policy(self) -> Policy:
        """The policy that is in force; the same for all models of the handle unless `auto` chose by device."""
        return self._only("plan", self.plans[:1]).policy

    def explain(self) -> str:
        """The plan as a table: module, class, parameters, dtypes, and which rule decided; optimizers of few bits."""
        parts = [*map(str, self.plans), "\n".join(filter(None, (low.describe() for low in self._low)))]
        return "\n\n".join(filter(None, parts)) or "not enabled: nothing is wrapped"

    __str__ = explain

    # The scale and the skips

    @property
    def scales(self) -> tuple[float, ...]:
        """The loss scale of each model; 1.0 where nothing is scaled. Reads the device."""
        return tuple(1.0 if m.scaler is None else m.backend.read(m.scaler.scale)[0] for m in self._models)

    @property
    def scale(self) -> float:
        """The loss scale of the only model; 1.0 where nothing is scaled. Reads the device.

        Raises:
            WrapprecError: there are several models: see `scales`.
        """
        return self._only("scale", self.scales or (1.0,))

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last optimizer step was skipped; reads the device after a fused step."""
        steppers = [stepper for stepper in self._steppers if stepper.clock]
        return max(steppers, key=lambda stepper: stepper.clock).was_skipped if steppers else False

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were skipped, resumed runs included; reads the device after fused steps.

        Raises:
            NonFiniteError: skipping fused steps has become pointless.
        """
        for stepper in self._steppers:
            stepper.check_patience()
        return self._count_skipped()

    def _count_skipped(self) -> int:
        return self._skipped_before + sum(stepper.skipped for stepper in self._steppers)

    def _only(self, what: str, values: tuple[T, ...]) -> T:
        if len(values) != 1:
            raise WrapprecError(
                message(
                    f"a handle of one model for .{what}",
                    f"a handle of {len(values)} models",
                    remedy=f"use .{what}s, a tuple in the order given to wrap",
                )
            )
        return values[0]

    # Optimizers

    def attach(self, optimizer: Optimizer, scheduler: Any = None, optimizer_bits: int | None = None) -> None:
        """Guard an optimizer that was built, or rebuilt, after `wrap`.

        Args:
            optimizer: its `step` is patched on the instance; attaching it twice does nothing more.
            scheduler: hold it while steps are skipped; costs one host read a step.
            optimizer_bits: what `wrap` was given, unless this says otherwise; state that is there already is quantised
                by the next step.

        Raises:
            PolicyError: the optimizer has no form with so few bits.
            TypeError: it is no torch.optim.Optimizer.
            ValueError: the scheduler is another optimizer's.
            PolicyError: it would train a weight that is quantised.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                message(
                    "a torch.optim.Optimizer",
                    f"{optimizer!r} (of type {type(optimizer).__name__})",
                    remedy="pass the optimizer object itself, or a sequence of them",
                )
            )
        optimizer = beneath(optimizer)
        if scheduler is not None:
            check_scheduler(scheduler, [optimizer])
        if not self._models:
            return
        for model in self._models:
            check_attached(model.model, optimizer)
        known = {id(p) for model in self._models for p in model.parameters()}
        warn_of_strangers(optimizer, known.union(*(originals(model.model) for model in self._models)))
        bits = self._optimizer_bits if optimizer_bits is None else optimizer_bits
        check(optimizer, bits)
        follow_dtypes(optimizer, self._models, self._undo)
        if bits is not None:
            # Below the guard: a step that is skipped does not come here.
            low = convert(optimizer, bits, functools.partial(embedded, [m.root for m in self._models]), self._undo)
            self._low += [low] if low not in self._low else []
        keep_updates(optimizer, self._models, self._rounders, self._undo)
        if optimizer not in self._followed:
            self._followed.add(optimizer)
            follow(optimizer, self, self._undo)
        scaled = [model for model in self._models if model.scaler is not None]
        if not scaled:
            return
        stepper = next((s for s in self._steppers if s.guards(optimizer)), None)
        if stepper is None:
            stepper = self._guard(Stepper(optimizer, scaled))
            for inner in inner_optimizers(optimizer):
                if not any(known.guards(inner) for known in self._steppers):
                    self._guard(Stepper(inner, scaled, owner=stepper))
            for model in scaled:
                model.owners = [owner for owner in model.owners if owner.alive] + [stepper]
                model.repartition()
        if scheduler is not None:
            stepper.hold(scheduler, self._undo)

    def quantise(self) -> None:
        """Quantise the state of the converted optimizers now, and not after their next step."""
        for low in self._low:
            low.quantise()

    def _guard(self, stepper: Stepper) -> Stepper:
        stepper.install(self._undo)
        stepper.restored.scale_loaded = self._loaded
        self._steppers.append(stepper)
        return stepper

    # Saving and resuming

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the model's and the optimizer's state.

        Returns:
            Numbers, strings, and int16 tensors of rounded weights: loads with ``torch.load(weights_only=True)``.
        """
        state = {
            "version": 1,
            "scales": [None if m.scaler is None else m.scaler.state_dict() for m in self._models],
            "skipped_steps": self._count_skipped(),
        }
        return state | save_kept(self._models)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume.

        Args:
            state: from `state_dict`, or from ``torch.amp.GradScaler.state_dict`` for all models alike.

        Raises:
            PolicyError: the state is neither, or of another number of models.
        """
        if not self._models:  # not enabled: there is nothing to resume
            return
        load_scales(self._models, state)
        load_kept(self._models, state.get("rounding") or [None] * len(self._models))
        self._skipped_before = int(state.get("skipped_steps", 0))
        self._loaded = True
        for stepper in self._steppers:
            stepper.skipped = 0
            stepper.restored.scale_loaded = True

    # Inference

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Cast the weights once, for generation and evaluation: gradients are off inside, as under torch.no_grad.

        Parameters and `state_dict` stay float32; weights that change inside are seen once every thread has left.
        """
        models = list(self._models)
        with _freezing:
            for model in models:
                model.freezers += 1
                model.frozen = {} if model.frozen is None else model.frozen
        try:
            with torch.no_grad():
                yield
        finally:
            with _freezing:
                for model in models:
                    model.freezers -= 1
                    if model.freezers == 0:
                        model.frozen = None

    # The way back

    def reset(self) -> None:
        """Close whatever scope an interrupt left open on this thread."""
        while thread.scope is not None and thread.scope.shared in self._models:
            thread.scope.close()

    def unwrap(self) -> None:
        """Take everything away again: hooks, patched methods, the scale. A second call does nothing.

        Where somebody wrapped our patched method since (a scheduler), it stays and passes through.
        """
        self.reset()
        for model in self._models:
            model.handle = None
        for obj, name in self._undo.undo():
            if name in ("forward", "_old_forward") and isinstance(obj, nn.Module):
                # accelerate's hooks were put over ours since, or taken away.
                take_away(obj)
        self._models, self._steppers, self._rounders, self._low = [], [], [], []

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unwrap()

    def __repr__(self) -> str:
        return f"Handle({', '.join(str(plan.policy) for plan in self.plans)})"
