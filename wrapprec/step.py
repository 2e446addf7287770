"""The patched optimizer step: ask `verdict`, then skip or step."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from wrapprec.closure import GiveUp, Guard
from wrapprec.errors import NonFiniteError
from wrapprec.fused import Skips, flagged, is_fused, prepare_momentum
from wrapprec.hold import Hold
from wrapprec.patch import function_of, patch
from wrapprec.resume import Restored
from wrapprec.state import Shared
from wrapprec.undo import UndoStack
from wrapprec.verdict import counts, judge, judge_patience

_clock = itertools.count(1)

_READ_EVERY = 100
"""Fused steps between two host reads of the count of skips."""


def inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one keeps to do its work for it, and of which a loop may call `step` directly."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found: list[Optimizer] = []
    todo: list[Optimizer] = [optimizer]
    while todo:
        for value in vars(todo.pop()).values():
            if not isinstance(value, Optimizer) or any(value is known for known in (optimizer, *found)):
                continue
            if any(id(p) in mine for group in value.param_groups for p in group["params"]):
                found.append(value)
                todo.append(value)
    return found


class Stepper:
    """What `wrap` puts in place of one optimizer's `step`.

    Args:
        optimizer: whose step this guards; it is not kept alive.
        models: the models of the handle that have a loss scale.
        owner: of the optimizer that this one does the work for (SAM's, Lookahead's), and answers for both.
    """

    def __init__(self, optimizer: Optimizer, models: list[Shared], owner: Stepper | None = None) -> None:
        self.owner = self if owner is None else owner
        self._optimizer = weakref.ref(optimizer)
        before = optimizer.__dict__.get("step")
        # A bound method would keep the optimizer alive.
        self._binds = getattr(before, "__self__", None) is optimizer
        self._before: Callable[..., Any] | None = function_of(before) if self._binds else before
        self._models = models
        self._owned: set[int] = set()
        self._count = -1
        self._steps = 0
        self._reads_always = False
        self._zeroed = False
        self.restored = Restored(models[0].backend)
        self.active = True
        # What only the device knows about fused steps, and what the host knows about the others.
        self._last: Tensor | bool = False
        self.skips = Skips()
        self._holds: list[Hold] = []
        # When this optimizer stepped last, against the others.
        self.clock = 0

    def guards(self, optimizer: Optimizer) -> bool:
        """Whether it is this optimizer's step."""
        return self._optimizer() is optimizer

    @property
    def alive(self) -> bool:
        """The optimizer exists and its step is ours."""
        return self.active and self._optimizer() is not None

    def owned(self, closely: bool = False) -> set[int]:
        """The ids of the parameters that the optimizer steps, of groups added later too.

        Args:
            closely: notice also that parameters were exchanged for others, as many.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return set()
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if closely or count != self._count:
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if owned != self._owned:
                self._count, self._owned = count, owned
                for model in self._models:
                    model.repartition()
        return self._owned

    @property
    def was_skipped(self) -> bool:
        """Whether the last step was skipped; reads the device where only it knows."""
        return bool(self._read(self._last)) if isinstance(self._last, Tensor) else self._last

    @property
    def skipped(self) -> int:
        """How many steps were skipped so far."""
        return self.skips.count(self._read)

    @skipped.setter
    def skipped(self, number: int) -> None:
        self.skips.on_host, self.skips.on_device = number, None

    def _read(self, tensor: Tensor) -> float:
        return self._models[0].backend.read(tensor)[0]

    # Installing

    def install(self, undo: UndoStack) -> None:
        """Patch the instance; everything goes through `undo`."""
        optimizer = self._optimizer()
        assert optimizer is not None

        # `wraps` carries over the mark of a scheduler that was built before.
        @functools.wraps(function_of(optimizer.step))
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return _eagerly(self, optimizer, args, kwargs)
            return self.step(optimizer, args, kwargs)

        zero_grad_before = optimizer.__dict__.get("zero_grad")

        @functools.wraps(function_of(optimizer.zero_grad))
        def zero_grad(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self.forget()
            if zero_grad_before is not None:
                return zero_grad_before(*args, **kwargs)
            return type(optimizer).zero_grad(optimizer, *args, **kwargs)

        undo.push(self._deactivate)
        patch(optimizer, "step", step, undo)
        patch(optimizer, "zero_grad", zero_grad, undo)
        undo.push(optimizer.register_load_state_dict_post_hook(self.restored.note).remove)

    def _deactivate(self) -> None:
        # A scheduler built after wrap keeps our step: from now on it passes through.
        self.active = False

    def hold(self, scheduler: Any, undo: UndoStack) -> None:
        """Keep `scheduler` where it is when every step since it last advanced was skipped."""
        hold = Hold(self._read)
        hold.install(scheduler, undo)
        self._holds.append(hold)

    # The step

    def step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Skip, or step, and update the scale of every model that this optimizer trains."""
        if not self.active:
            return self._original(optimizer, *args, **kwargs)
        self.owned(closely=True)
        # One that owns no weights of theirs was given all the same: a hypernetwork's, behind a functional_call.
        trained = [model for model in self._models if model.trained_by(self.owner)] or self._models
        self._models[0].backend.refuse_recording(
            "a policy without a loss scale, or its optimizer steps outside of graphs that are replayed",
            f"{type(optimizer).__name__}.step() under a loss scale: replays would not update it",
            remedy="use a bf16 policy, of which forward, backward and step can be recorded",
        )
        self.restored.check(stacklevel=3)
        self.clock = next(_clock)
        closure = args[0] if args else kwargs.get("closure")
        if closure is not None:
            rest = {key: value for key, value in kwargs.items() if key != "closure"}
            return self._step_with_closure(optimizer, trained, closure, args[1:], rest)
        with torch.no_grad():
            skip = judge(optimizer, self.owner, trained, self._models)
            fused = is_fused(optimizer)
            if fused and not self._reads_always and prepare_momentum(optimizer):
                return self._step_on_device(optimizer, skip, args, kwargs)
            skipped, numbers = self._read_verdict(skip, trained)
            self._note(skipped)
            self._reads_always = judge_patience(trained, numbers)
        if skipped:
            return self._skip(optimizer)
        if not fused:
            return self._original(optimizer, *args, **kwargs)
        with flagged(optimizer, skip):
            return self._original(optimizer, *args, **kwargs)

    def _original(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if self._before is None:
            out = type(optimizer).step(optimizer, *args, **kwargs)
        else:
            out = self._before(*((optimizer,) if self._binds else ()), *args, **kwargs)
        for model in self._models:
            for bucket in model.pending():
                bucket.watch(self._owned)
        return out

    def _skip(self, optimizer: Optimizer, out: Any = None) -> Any:
        if getattr(self._before, "_wrapped_by_lr_sched", False):
            # What a scheduler that was built before looks at, to warn that it advances before the optimizer.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        return out

    def _note(self, skipped: bool) -> None:
        self._last = skipped
        self.skips.on_host += skipped
        for hold in self._holds:
            hold.note(skipped)

    def _read_verdict(self, skip: Tensor, trained: list[Shared]) -> tuple[bool, list[float]]:
        """Read, once, whether to skip, and what tells whether skipping has a point."""
        skipped, *numbers = trained[0].backend.read(skip, *counts(trained))
        return bool(skipped), numbers

    def _step_on_device(self, optimizer: Optimizer, skip: Tensor, args: Any, kwargs: Any) -> Any:
        """Let the kernel skip."""
        with flagged(optimizer, skip):
            out = self._original(optimizer, *args, **kwargs)
        self._last = skip
        so_far = self.skips.on_device
        self.skips.on_device = skip if so_far is None else so_far + skip
        for hold in self._holds:
            hold.note(skip)
        self._steps += 1
        if self._steps % _READ_EVERY == 0:
            self.check_patience()
        return out

    def check_patience(self) -> None:
        """Read how many fused steps in a row were skipped: now and then, and when the handle is asked."""
        trained = [model for model in self._models if model.trained_by(self.owner)]
        if trained and self.skips.on_device is not None:
            numbers = trained[0].backend.read(*counts(trained))
            self._reads_always |= judge_patience(trained, numbers)

    def forget(self) -> None:
        """Gradients were zeroed: nothing recorded concerns the next step. The scale's backoff stays due."""
        self._zeroed = True
        for model in self._models:
            for bucket in model.pending():
                if self.owner in bucket.owners:
                    bucket.consume(self.owner)

    # Closures

    def _step_with_closure(
        self, optimizer: Optimizer, trained: list[Shared], closure: Callable[[], Any], args: Any, kwargs: Any
    ) -> Any:
        def overflowed() -> tuple[bool, bool]:
            with torch.no_grad():
                skipped, numbers = self._read_verdict(judge(optimizer, self.owner, trained, self._models), trained)
                self._reads_always = judge_patience(trained, numbers)
            return skipped, any(numbers[::2])

        def zeroed() -> bool:
            was, self._zeroed = self._zeroed, False
            return was

        guard = Guard(optimizer, closure, overflowed, zeroed)
        try:
            out = self._original(optimizer, guard, *args, **kwargs)
        except (GiveUp, NonFiniteError) as error:
            self._note(True)
            guard.put_back()
            if isinstance(error, NonFiniteError):
                raise
            return self._skip(optimizer, guard.loss)
        self._note(False)
        return out


_eagerly: Any = _disable_dynamo(Stepper.step)
"""What `torch.compile(optimizer.step)` runs: the verdict is no matter for a graph."""
