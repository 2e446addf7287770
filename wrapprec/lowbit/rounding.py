"""The optimizer step of low precision weights: the optimizer sees float32 weights and state, and the result is rounded.

While the step runs, stand-ins hold the places of the parameters in ``param_groups`` and the state. They are float32,
the same objects at every step, and empty between steps. So any optimizer does what it does in float32, and the
``nn.Parameter`` objects, to which DDP, schedulers and the model hold on, stay what they are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from wrapprec.dtypes import LOW
from wrapprec.errors import StepError, message
from wrapprec.lowbit.forms import is_mark
from wrapprec.lowbit.keep import Kept
from wrapprec.lowbit.states import load_wide, widen_state
from wrapprec.lowbit.words import bits
from wrapprec.patch import function_of, patch
from wrapprec.state import Shared
from wrapprec.undo import UndoStack

PART = 2**20
"""How many elements are shown to an optimizer of torch at once: 4 MiB of float32 weights, and as much of gradients."""

_Lists = list[tuple[list[Any], list[Any]]]
"""The ``params`` of each group, and what is to stand in it."""


class Rounder:
    """What `wrap` puts around one optimizer's `step` where it trains low precision weights.

    Args:
        optimizer: it is not kept alive.
        models: those of the handle whose weights are rounded.
        theirs: the ids of the parameters that another optimizer, which this one keeps, steps for it.
    """

    def __init__(self, optimizer: Optimizer, models: list[Shared], theirs: set[int]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._models = models
        self._theirs = theirs
        self._before, self._binds = _unbound(optimizer, "step")
        # By id: the parameter, its name, what keeps its remainder, and its stand-in.
        self._known: dict[int, tuple[Tensor, str, Kept, nn.Parameter]] = {}
        self._seed: int | None = None
        # It was seen to change the stand-ins: it is not one that steps parameters of its own list.
        self._trusted = type(optimizer).__module__.startswith(("torch.optim.", "bitsandbytes.", "torch_xla."))
        self.active = True

    def guards(self, optimizer: Optimizer) -> bool:
        """Whether it is this optimizer's step."""
        return self.active and self._optimizer() is optimizer

    def install(self, undo: UndoStack) -> None:
        """Patch `step` and `load_state_dict` on the instance."""
        optimizer = self._optimizer()
        assert optimizer is not None

        @functools.wraps(function_of(optimizer.step))
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return _eagerly(self, optimizer, args, kwargs)

        loading, binds = _unbound(optimizer, "load_state_dict")

        @functools.wraps(function_of(optimizer.load_state_dict))
        def load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            if loading is None:
                type(optimizer).load_state_dict(optimizer, state_dict)
            else:
                loading(*((optimizer,) if binds else ()), state_dict)
            if self.active:
                load_wide(optimizer, state_dict)

        undo.push(self._deactivate)
        patch(optimizer, "step", step, undo)
        patch(optimizer, "load_state_dict", load_state_dict, undo)

    def _deactivate(self) -> None:
        # A scheduler built after wrap keeps our step: from now on it passes through.
        self.active = False
        self._known.clear()

    # The step

    def step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step in float32, and round the weights."""
        bound = (optimizer,) if self._binds else ()
        original = functools.partial(type(optimizer).step if self._before is None else self._before, *bound)
        lists = [group["params"] for group in optimizer.param_groups]
        if not self.active or not any(param.dtype in LOW for params in lists for param in params):
            return original(*args, **kwargs)
        self._look_up([param for params in lists for param in params])
        closure = args[0] if args else kwargs.get("closure")
        if callable(closure):
            return self._step_with_closure(optimizer, original, closure, args[1:], kwargs)
        out = None
        with torch.no_grad():
            parts = self._parts(lists) if self._by_parts(optimizer) else [[(params, list(params)) for params in lists]]
            for part in parts:
                with self._shown(optimizer, part) as commit:
                    out = original(*args, **kwargs)
                    commit()
        return out

    def _look_up(self, params: list[Tensor]) -> None:
        """Find the models, and the names, of low precision parameters that were not stepped before."""
        # A frozen one has no remainder, and needs none.
        trained = {id(p) for p in params if p.dtype in LOW and (p.requires_grad or p.grad is not None)}
        wanted = trained - self._known.keys() - self._theirs
        if not wanted:
            return
        for model in self._models:
            for name, param in model.named_parameters():
                if id(param) in wanted and model.converted is not None and model.converted.mode is not None:
                    stand_in: Any = nn.Parameter(param.new_empty(0, dtype=torch.float32))
                    stand_in.stands_for = param
                    self._known[id(param)] = param, name, model.converted, stand_in

    def _by_parts(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer steps each parameter by itself, and nobody counts the calls."""
        before = self._before
        own = before is None or getattr(before, "in_parts", False) or is_mark(before, optimizer)
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        hooks = hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        known = type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, LBFGS)
        return bool(own and known and not hooks)

    def _parts(self, lists: list[list[Any]]) -> Iterator[_Lists]:
        """Parts of about as many elements, every parameter in one of them; what has no gradient is in none."""
        part: _Lists = [(params, []) for params in lists]
        size, first = 0, True
        for number, params in enumerate([list(params) for params in lists]):
            for param in params:
                if param.grad is None:
                    continue
                part[number][1].append(param)
                size += param.numel() if id(param) in self._known else 0
                if size >= PART:
                    yield part
                    part, size, first = [(params, []) for params in lists], 0, False
        if first or any(chosen for _, chosen in part):
            yield part

    @contextmanager
    def _shown(self, optimizer: Optimizer, part: _Lists) -> Iterator[Callable[[], None]]:
        """Let the optimizer see stand-ins for a part of the parameters, and give what writes their values back."""
        wholes = [(params, list(params)) for params, _ in part]
        shown = [self._known[id(param)] for _, chosen in part for param in chosen if id(param) in self._known]
        checks: list[tuple[Tensor, Tensor]] = []
        try:
            for param, name, kept, stand_in in shown:
                stand_in.data = kept.widen(name, param)
                _show_gradient(param, stand_in)
                if param in optimizer.state:
                    optimizer.state[stand_in] = widen_state(optimizer.state.pop(param))
                if not self._trusted:
                    checks.append((param.detach().clone(), stand_in.detach().clone()))
            for params, chosen in part:
                params[:] = [self._known[id(param)][3] if id(param) in self._known else param for param in chosen]

            def commit() -> None:
                self._check(optimizer, shown, checks)
                for param, name, kept, stand_in in shown:
                    kept.narrow(name, param, stand_in.detach(), self._seed_of(optimizer))

            yield commit
        finally:
            for params, whole in wholes:
                params[:] = whole
            for param, _, _, stand_in in shown:
                if stand_in in optimizer.state:
                    optimizer.state[param] = optimizer.state.pop(stand_in)
                stand_in.grad = None
                stand_in.data = stand_in.data.new_empty(0)

    def _check(self, optimizer: Optimizer, shown: list[Any], checks: list[tuple[Tensor, Tensor]]) -> None:
        """Refuse an optimizer that steps the parameters behind our back: what it did would be written over."""
        for (param, name, _, stand_in), (before, wide) in zip(shown, checks, strict=False):
            if not torch.equal(stand_in.detach(), wide):
                self._trusted = True
            if not torch.equal(param.detach(), before):
                param.copy_(before)
                raise StepError(
                    message(
                        "an optimizer that steps the parameters in its param_groups",
                        f"{type(optimizer).__name__}, which changed a parameter that it found elsewhere",
                        where=repr(name),
                        remedy="let it read param_groups at each step, or use rounding=none",
                    )
                )

    def _seed_of(self, optimizer: Optimizer) -> int:
        """The same on all processes that have the same weights, which must be rounded alike."""
        if self._seed is None:
            self._seed = torch.initial_seed()
            if dist.is_available() and dist.is_initialized():
                words = [bits(param.detach(), torch.int16) for param, *_ in self._known.values()]
                self._seed = sum(int(word.sum(dtype=torch.int64)) * (i + 1) for i, word in enumerate(words)) % 2**63
        return self._seed

    # Closures

    def _step_with_closure(
        self, optimizer: Optimizer, original: Any, closure: Callable[[], Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Round before each evaluation, which is of the model itself, and show the gradients that it gives."""
        rest = {key: value for key, value in kwargs.items() if key != "closure"}
        lists = [group["params"] for group in optimizer.param_groups]
        part = [(params, list(params)) for params in lists]
        known = [self._known[id(param)] for _, chosen in part for param in chosen if id(param) in self._known]
        before = [param.detach().clone() for param, *_ in known]
        stood: list[Any] = []

        def evaluate() -> Any:
            with torch.no_grad():
                for param, _, _, stand_in in known:
                    param.copy_(stand_in)
            for (params, chosen), seen in zip(part, stood, strict=True):
                seen[:], params[:] = list(params), chosen
            try:
                return closure()
            finally:
                for (params, _), seen in zip(part, stood, strict=True):
                    params[:] = seen
                for param, _, _, stand_in in known:
                    _show_gradient(param, stand_in)

        try:
            with self._shown(optimizer, part) as commit:
                stood = [[] for _ in part]
                out = original(evaluate, *args, **rest)
                with torch.no_grad():
                    for (param, *_), bits in zip(known, before, strict=True):
                        param.copy_(bits)
                    commit()
        except BaseException:
            with torch.no_grad():
                for (param, *_), bits in zip(known, before, strict=True):
                    param.copy_(bits)
            raise
        return out


def _unbound(optimizer: Optimizer, name: str) -> tuple[Callable[..., Any] | None, bool]:
    """A method that somebody has set on the instance, without what would keep it alive; and whether it is to be given.

    Where there is none, it is the class's, and is to be given.
    """
    own = optimizer.__dict__.get(name)
    if own is None or getattr(own, "__self__", None) is optimizer:
        return function_of(own), True
    return own, False


def _show_gradient(param: Tensor, stand_in: Tensor) -> None:
    grad = param.grad
    stand_in.grad = None if grad is None else grad.to(torch.float32)


_eagerly: Any = _disable_dynamo(Rounder.step)
"""What `torch.compile(optimizer.step)` runs: stand-ins are no matter for a graph."""
