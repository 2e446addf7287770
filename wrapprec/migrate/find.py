"""Finds the models that a script trains, each at its first training forward, and wraps them with their optimizers.

Optimizers are noted when they are built. As long as one of them has not found its model, calls of modules are watched,
and only as long: a script runs at full speed once its models are wrapped.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from wrapprec.dtypes import name
from wrapprec.errors import WrapprecWarning
from wrapprec.handle import Handle
from wrapprec.migrate.byhand import ByHand
from wrapprec.migrate.outcome import Found
from wrapprec.migrate.roots import params_in, params_of, roots_of
from wrapprec.migrate.watch import builds, calls
from wrapprec.plan import resolve
from wrapprec.step import inner_optimizers
from wrapprec.wrap import handle_of, wrap

_PATIENCE = 1000
"""Outermost calls of modules whose parameters no optimizer has, after which only other modules are looked at."""


class Finder:
    """Watches for optimizers and for the models whose parameters they have.

    Args:
        policy: for `wrap`.
        say: takes one line for the user.
        dry_run: print the plan at the first training forward, and end the script.
    """

    def __init__(self, policy: Any, say: Callable[[str], None], dry_run: bool = False) -> None:
        self.policy = policy
        self.say = say
        self.dry_run = dry_run
        self.found: list[Found] = []
        self.prints = True
        self.when_wrapped: Callable[[], None] = lambda: None
        self._by_hand: ByHand | None = ByHand()
        self._waiting: list[weakref.ref[Optimizer]] = []
        self._scripts_own: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._said: set[str] = set()
        self._misses = 0
        # By id, the first of those that were looked at in vain.
        self._strangers: dict[int, weakref.ref[nn.Module]] = {}
        self._lock = threading.RLock()

    # Watching

    @property
    def is_installed(self) -> bool:
        """Whether it is told of optimizers that are built."""
        return self in builds.watchers

    def install(self) -> None:
        """Note every optimizer that is built from now on; until there is one, models may be stepped by hand."""
        builds.add(self)
        if len(builds.watchers) > 1:  # of `wrapprec run`, and of Apex's `amp.init` in the script that it runs
            for finder in builds.watchers:
                finder._by_hand = None  # the script has begun to use Apex
                if not finder._waiting:
                    calls.discard(finder)
        if self._by_hand is not None:
            calls.add(self)

    def expect(self, optimizer: Optimizer) -> None:
        """Watch for the model of an optimizer, such as one that was built before.

        Args:
            optimizer: nothing happens where it is expected.
        """
        self._by_hand = None
        if all(ref() is not optimizer for ref in self._waiting):
            self._waiting.append(weakref.ref(optimizer))
        self._misses = 0
        self._strangers.clear()
        calls.add(self)

    def remove(self) -> None:
        """Watch no more; what is wrapped stays wrapped."""
        builds.discard(self)
        calls.discard(self)
        self._waiting.clear()

    # Finding

    def look_at(self, module: nn.Module) -> None:
        """A module is called, from outside of any other: wrap it if an optimizer has its parameters.

        Args:
            module: the one that is called.
        """
        stranger = self._strangers.get(id(module)) if self._misses > _PATIENCE else None
        if not torch.is_grad_enabled() or (stranger is not None and stranger() is module):
            return
        with self._lock:
            waiting = [optimizer for ref in self._waiting if (optimizer := ref()) is not None]
            owned = {id(param) for param in params_in(module)}
            mine = [optimizer for optimizer in waiting if owned & params_of([optimizer])]
            if mine:
                self._settle(module, mine)
            elif owned:
                self._misses += 1
                if len(self._strangers) < _PATIENCE:
                    self._strangers[id(module)] = weakref.ref(module)
                self._note_low(module)
                if self._by_hand is not None and self._by_hand.trains(module) and not low_of(module):
                    self._settle(module, [])
            self._waiting = [weakref.ref(left) for left in waiting if all(left is not known for known in mine)]
            if not self._waiting and (self._by_hand is None or self._misses > _PATIENCE):
                calls.discard(self)

    def look_back(self, module: nn.Module, out: Any) -> None:
        """A module was called, from outside of any other.

        Args:
            module: the one.
            out: what it returned.
        """
        if self._by_hand is not None:
            self._by_hand.watch(module, out)

    def _settle(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        inner = [below for optimizer in optimizers for below in inner_optimizers(optimizer)]
        mine = [optimizer for optimizer in optimizers if all(optimizer is not below for below in inner)]
        handle = handle_of(module)
        if handle is not None:
            self._join(handle, mine)
            return
        roots = roots_of(module, params_of(mine))
        found = Found(_label(roots, mine))
        self.found.append(found)
        found.reason = next((why for root in roots if (why := why_not(root)) is not None), None)
        if found.reason is None and not mine:
            found.reason = self._why_not_by_hand(roots)
        if self.dry_run:
            if self.prints:
                print(f"{found.label}: left alone, because {found.reason}" if found.reason else self._plans(roots))
            raise SystemExit(0)
        if found.reason is None:
            self._wrap(found, roots, mine)
        if found.handle is None:
            self.say(f"left {found.label} alone, because {found.reason}")
        else:
            self.when_wrapped()

    def models(self) -> list[nn.Module]:
        """The models that were wrapped, and live; not those that the script wraps itself."""
        handles = [found.handle for found in self.found if found.handle not in (None, *self._scripts_own)]
        shared = [model for handle in handles if handle is not None for model in handle._models]
        return [root for model in shared if (root := model.model) is not None]

    def _note_low(self, module: nn.Module) -> None:
        """Say why a model is left alone that trains in low precision while the optimizer has copies of its weights."""
        if low := low_of(module):
            found = Found(_label([module], []))
            found.reason = f"{low}, and no optimizer has them: its precision is the script's own"
            line = f"left {found.label} alone, because {found.reason}"
            if line not in self._said:
                self._said.add(line)
                self.found.append(found)
                self.say(line)

    def _join(self, handle: Handle, optimizers: list[Optimizer]) -> None:
        """An optimizer turns up for a model that is wrapped: by us, or else by the script, or by Apex's API for it."""
        known = next((found for found in self.found if found.handle is handle), None)
        if known is not None:
            try:
                for optimizer in optimizers if handle not in self._scripts_own else ():
                    handle.attach(optimizer)
            except Exception as error:
                # Without a guard its steps could overflow: the model goes on in float32.
                handle.unwrap()
                known.reason = f"wrapprec refuses its {type(optimizer).__name__}: {_received(error)}"
                self.say(f"left {known.label} alone from now on, because {known.reason}")
            else:
                known.wrapped(handle)
            return
        found = Found(_label([root for model in handle._models if (root := model.model) is not None], optimizers))
        found.wrapped(handle)
        self.found.append(found)
        self._scripts_own.add(handle)
        self.when_wrapped()

    def _wrap(self, found: Found, roots: list[nn.Module], optimizers: list[Optimizer]) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found.wrapped(wrap(roots, optimizers or None, self.policy))
            except Exception as error:  # `wrap` changed nothing, and the script goes on
                found.reason = f"wrapprec refuses it: {_received(error)}"
        for one in caught:
            if issubclass(one.category, WrapprecWarning):
                self.say(str(one.message))
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def _why_not_by_hand(self, roots: list[nn.Module]) -> str | None:
        """Why a model that no torch optimizer steps is not to be wrapped."""
        try:
            plans = [resolve(root, self.policy) for root in roots]
        except Exception:  # `wrap` says why
            return None
        if any(plan.loss_scale is not None for plan in plans):
            return "the script steps it without a torch optimizer: nothing could skip a step that overflows"
        if any(one.precision.param_dtype is not torch.float32 for plan in plans for one in plan.placements):
            return "the script steps it without a torch optimizer: nothing could round its weights"
        return None

    def _plans(self, roots: list[nn.Module]) -> str:
        return "\n\n".join(str(resolve(root, self.policy)) for root in roots)


def _received(error: Exception) -> str:
    received = [line for line in str(error).splitlines() if line.startswith("Received: ")]
    text = received[0].removeprefix("Received: ") if received else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


def _label(roots: list[nn.Module], optimizers: list[Optimizer]) -> str:
    sizes = {id(p): p.numel() for root in roots for p in params_in(root) if not is_lazy(p)}
    number = sum(sizes.values())
    models = " and ".join(type(root).__name__ for root in roots)
    names = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
    return f"{models} ({number:,} parameters{', ' * bool(names)}{names})"


def why_not(module: nn.Module) -> str | None:
    """Why a model that a script is about to train is not to be wrapped; None where it is.

    Args:
        module: the root; what surrounds its call counts, too.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit, and runs without Python"
    params = [param for param in params_in(module) if param.is_floating_point()]
    kinds = {param.device.type for param in params}
    if any(_is_autocast_on(kind) for kind in kinds):
        return "the script calls it under torch.autocast: its precision is the script's own"
    if low := low_of(module):
        return f"{low}: its precision is the script's own"
    for one in module.modules():
        home = type(one).__module__
        if home.startswith(("deepspeed.", "torch.distributed.fsdp.fully_sharded_data_parallel")):
            return f"{home.partition('.')[0]}'s {type(one).__name__} has a precision setting of its own"
    apex = getattr(sys.modules.get("apex.amp._amp_state"), "_amp_state", None)
    if getattr(getattr(apex, "opt_properties", None), "enabled", False):
        return "the installed Apex patches torch for it"
    return None


def low_of(module: nn.Module) -> str:
    """Say in which dtypes a model trains where that is not float32; nothing where it is."""
    low = {param.dtype for param in params_in(module) if param.is_floating_point() and param.requires_grad}
    low -= {torch.float32}
    return f"its parameters are {' and '.join(sorted(map(name, low)))}" if low else ""


def _is_autocast_on(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:  # there is none for the meta device
        return False
