"""The patched optimizer step: ask `verdict`, then skip or step."""

from __future__ import annotations

import functools
import itertools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wrapprec.closure import GiveUp, Guard
from wrapprec.errors import WrapprecWarning, message
from wrapprec.state import Shared
from wrapprec.undo import UndoStack
from wrapprec.verdict import judge, judge_patience, scalers

_clock = itertools.count(1)

_READ_EVERY = 100
"""Fused steps between two host reads of the count of skips."""


class Stepper:
    """What `wrap` puts in place of one optimizer's `step`.

    Args:
        optimizer: whose step this guards.
        models: the models of the handle that have a loss scale.
    """

    def __init__(self, optimizer: Optimizer, models: list[Shared]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._before: Callable[..., Any] | None = optimizer.__dict__.get("step")
        self._models = models
        self._owned: set[int] = set()
        self._count = -1
        self._trained: list[Shared] = []
        self._steps = 0
        self._reads_always = False
        self._zeroed = False
        self._state_loaded = False
        self.scale_loaded = False
        self.active = True
        # What only the device knows about fused steps, and what the host knows about the others.
        self._last: Tensor | bool = False
        self._skipped_on_device: Tensor | None = None
        self._skipped = 0
        # Good steps since a held scheduler last advanced; None without one.
        self._good: Tensor | None = None
        self._stepped = False
        # When this optimizer stepped last, against the others.
        self.clock = 0

    def guards(self, optimizer: Optimizer) -> bool:
        """Whether it is this optimizer's step."""
        return self._optimizer() is optimizer

    @property
    def alive(self) -> bool:
        """The optimizer exists and its step is ours."""
        return self.active and self._optimizer() is not None

    def owned(self) -> set[int]:
        """The ids of the parameters that the optimizer steps, of groups added later too."""
        optimizer = self._optimizer()
        if optimizer is None:
            return set()
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if count != self._count:
            self._count = count
            self._owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._trained = [model for model in self._models if model.owns_any(self._owned)]
            for model in self._trained:
                model.repartition()
        return self._owned

    @property
    def was_skipped(self) -> bool:
        """Whether the last step was skipped; reads the device where only it knows."""
        return bool(self._read(self._last)) if isinstance(self._last, Tensor) else self._last

    @property
    def skipped(self) -> int:
        """How many steps were skipped so far."""
        on_device = 0.0 if self._skipped_on_device is None else self._read(self._skipped_on_device)
        return self._skipped + int(on_device)

    @skipped.setter
    def skipped(self, number: int) -> None:
        self._skipped, self._skipped_on_device = number, None

    def _read(self, tensor: Tensor) -> float:
        return self._models[0].backend.read(tensor)[0]

    # Installing

    def install(self, undo: UndoStack) -> None:
        """Patch the instance; everything goes through `undo`."""
        optimizer = self._optimizer()
        assert optimizer is not None

        # A function bound as a method: LRScheduler.__init__ reads `step.__func__` and binds it again. `wraps` carries
        # over the mark of a scheduler that was built before.
        @functools.wraps(optimizer.step)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self.step(optimizer, args, kwargs)

        zero_grad_before = optimizer.__dict__.get("zero_grad")

        @functools.wraps(optimizer.zero_grad)
        def zero_grad(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self.forget()
            if zero_grad_before is not None:
                return zero_grad_before(*args, **kwargs)
            return type(optimizer).zero_grad(optimizer, *args, **kwargs)

        undo.push(self._deactivate)
        undo.set_attribute(optimizer, "step", types.MethodType(step, optimizer))
        undo.set_attribute(optimizer, "zero_grad", types.MethodType(zero_grad, optimizer))
        undo.push(optimizer.register_load_state_dict_post_hook(self._note_loaded).remove)

    def _deactivate(self) -> None:
        # A scheduler built after wrap keeps our step: from now on it passes through.
        self.active = False

    def _note_loaded(self, optimizer: Optimizer) -> None:
        self._state_loaded = bool(optimizer.state)

    def _check_restored(self) -> None:
        if self._state_loaded and not self.scale_loaded:
            text = message(
                "the loss scale to be restored together with the optimizer's state",
                "optimizer.load_state_dict(...) alone; the loss scale starts anew",
                remedy="save handle.state_dict() too, and call handle.load_state_dict(...) when resuming",
            )
            warnings.warn(text, WrapprecWarning, stacklevel=5)
        self._state_loaded = self.scale_loaded = False

    # The step

    def step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Skip, or step, and update the scale of every model that this optimizer trains."""
        self.owned()
        if not self.active or not self._trained:
            return self._original(optimizer, *args, **kwargs)
        self._check_restored()
        self._stepped = True
        self.clock = next(_clock)
        closure = args[0] if args else kwargs.get("closure")
        if closure is not None:
            rest = {key: value for key, value in kwargs.items() if key != "closure"}
            return self._step_with_closure(optimizer, closure, args[1:], rest)
        with torch.no_grad():
            skip = judge(optimizer, self, self._trained)
            if self._is_fused(optimizer):
                return self._step_fused(optimizer, skip, args, kwargs)
            skipped = self._decide(skip)
        return self._skip(optimizer) if skipped else self._original_watched(optimizer, *args, **kwargs)

    def _original(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            return self._before(*args, **kwargs)
        return type(optimizer).step(optimizer, *args, **kwargs)

    def _original_watched(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        out = self._original(optimizer, *args, **kwargs)
        for model in self._models:
            for bucket in model.pending():
                bucket.watch()
        return out

    def _skip(self, optimizer: Optimizer, out: Any = None) -> Any:
        # What a scheduler that was built before looks at, to warn that it advances before the optimizer.
        optimizer._opt_called = True  # type: ignore[attr-defined]  # set by LRScheduler, too
        return out

    def _decide(self, skip: Tensor) -> bool:
        """Read, once, whether to skip."""
        counts = [scaler.consecutive for scaler in scalers(self._trained)]
        skipped, *consecutive = self._models[0].backend.read(skip, *counts)
        self._last = bool(skipped)
        self._skipped += int(self._last)
        if self._good is not None:
            self._good = self._good + (1 - skip)
        self._reads_always = judge_patience(self._trained, consecutive)
        return self._last

    # Fused kernels

    def _is_fused(self, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(g.get("fused") for g in groups)

    def _step_fused(self, optimizer: Any, skip: Tensor, args: Any, kwargs: Any) -> Any:
        """Hand the flag to the kernel, which skips on the device."""
        on_host = self._reads_always or not _momentum_is_ready(optimizer)
        if on_host and self._decide(skip):
            return self._skip(optimizer)
        theirs = getattr(optimizer, "found_inf", None)
        optimizer.found_inf = skip if theirs is None else torch.maximum(skip, theirs.to(skip))
        try:
            out = self._original_watched(optimizer, *args, **kwargs)
        finally:
            if theirs is None:
                del optimizer.found_inf
            else:
                optimizer.found_inf = theirs
        if on_host:
            return out
        self._last = skip
        so_far = self._skipped_on_device
        self._skipped_on_device = skip if so_far is None else so_far + skip
        if self._good is not None:
            self._good = self._good + (1 - skip)
        self._steps += 1
        if self._steps % _READ_EVERY == 0:
            self.check_patience()
        return out

    def check_patience(self) -> None:
        """Read how many steps in a row were skipped: now and then after fused steps, and when the handle is asked."""
        if self._trained:
            counts = self._models[0].backend.read(*(scaler.consecutive for scaler in scalers(self._trained)))
            self._reads_always |= judge_patience(self._trained, counts)

    def forget(self) -> None:
        """Gradients were zeroed: nothing recorded concerns the next step. The scale's backoff stays due."""
        self._zeroed = True
        for model in self._trained:
            for bucket in model.pending():
                if self in bucket.owners:
                    bucket.consume(self)

    # Closures

    def _step_with_closure(self, optimizer: Optimizer, closure: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        skipped_before = self._skipped

        def overflowed() -> tuple[bool, bool]:
            with torch.no_grad():
                if not self._decide(judge(optimizer, self, self._trained)):
                    return False, False
                self._skipped = skipped_before  # an evaluation that is repeated is no skipped step
                counts = self._models[0].backend.read(*(scaler.consecutive for scaler in scalers(self._trained)))
            return True, any(counts)

        def zeroed() -> bool:
            was, self._zeroed = self._zeroed, False
            return was

        guard = Guard(optimizer, closure, overflowed, zeroed)
        try:
            return self._original_watched(optimizer, guard, *args, **kwargs)
        except GiveUp:
            guard.put_back()
            self._skipped += 1
            return self._skip(optimizer, guard.loss)

    # Schedulers

    def hold(self, scheduler: Any, undo: UndoStack) -> None:
        """Keep `scheduler` where it is when every step since it last advanced was skipped; one host read a step."""
        self._good = torch.zeros((), device=scalers(self._models)[0].device)
        before = scheduler.__dict__.get("step")

        @functools.wraps(scheduler.step)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self.active and self._good is not None and self._stepped:
                self._stepped = False
                good, self._good = self._good, torch.zeros_like(self._good)
                if not self._read(good):
                    return None
            return before(*args, **kwargs) if before is not None else type(scheduler).step(scheduler, *args, **kwargs)

        undo.set_attribute(scheduler, "step", types.MethodType(step, scheduler))


def _momentum_is_ready(optimizer: Optimizer) -> bool:
    """Give fused SGD initialised momentum, which its kernel leaves unwritten when the first step is skipped.

    Zeros are what a first step makes of no momentum at all, unless there is dampening: then False, ask the host.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not group["momentum"] or param.grad is None:
                continue
            if optimizer.state[param].get("momentum_buffer") is None:
                if group["dampening"]:
                    return False
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return True
