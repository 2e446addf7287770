"""The `_parameters` of a module while threads have lent its weights.

A plain dict with the originals, over which each thread that has a scope open sees its own lent weights. Other threads
(a checkpoint writer, an EMA, a second forward) see the originals, or their own, without waiting for anybody.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, ItemsView, ValuesView
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

_installing = threading.Lock()
"""Held while a `Lent` is put in place or taken away, never while user code runs."""

rnn_turn = threading.RLock()
"""Held while an RNN runs: it keeps its weights, which differ from thread to thread, in attributes of the module."""

joining = threading.RLock()
"""Held while a weight gets its first node in a graph. Torch takes a lock of the weight for that: a Function while it
has the interpreter, an operation without it, which it may then want. Two threads, one at each, wait for ever."""

_RNN_ATTRIBUTES = ("_flat_weights", "_flat_weight_refs")

FORMER = "_former_parameters"
"""Where a replica of nn.DataParallel, which has no parameters, keeps its weights; they are attributes, too."""

Weights = dict[str, Any]


class Later:
    """A weight that is lent when forward first asks for it.

    So a weight is cast just before its use, and a weight that is not used never; and since autograd runs the nodes
    that were made last first, its gradient is cast as soon as backward has reached it.

    Args:
        make: gives the lent weight.
    """

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make


class Awaited:
    """A weight that is on the meta device until an offloading hook (accelerate's) brings it, when its module is called.

    What the hook brings is cast, and stays out of the module's own dict: nothing is kept when the hook takes it away.
    Its gradient would be lost in any case.

    Args:
        dtype: to cast to, or None for its own.
    """

    __slots__ = ("dtype", "weight")

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.weight: Tensor | None = None

    def take(self, value: Tensor) -> None:
        """The hook has brought the weight, or taken it away."""
        self.weight = None if value.is_meta else nn.Parameter(value.detach().to(self.dtype), requires_grad=False)


class Brought:
    """A weight that FSDP puts into its module when that is called, and takes away again, once or more in a scope.

    Args:
        make: gives what is lent for what FSDP has put there.
        check: of what was lent, that it was not written to.
    """

    __slots__ = ("brought", "check", "lent", "make")

    def __init__(self, make: Callable[[Tensor], Tensor], check: Callable[[Tensor], None]) -> None:
        self.make = make
        self.check = check
        self.brought: Tensor | None = None
        self.lent: Tensor | None = None

    def see(self, brought: Tensor) -> Tensor:
        """What is lent for what the module has now."""
        if self.lent is None or self.brought is not brought:
            self.drop()
            self.brought, self.lent = brought, self.make(brought)
        return self.lent

    def drop(self) -> None:
        """The weight is taken away: nothing of it may be kept."""
        if self.lent is not None:
            lent, self.brought, self.lent = self.lent, None, None
            self.check(lent)


_LENT = (Later, Tensor)


class Lent(dict[str, Any]):
    """A module's parameters by name: the originals, and per thread the weights lent in their place.

    Args:
        module: whose `_parameters` this replaces until the last thread is done.
    """

    def __init__(self, module: nn.Module) -> None:
        original = module.__dict__["_parameters"]
        super().__init__(original)
        self.original: dict[str, Any] = original
        self.overlays: dict[int, list[Weights]] = {}
        # An RNN keeps a list of its weights, and rebuilds it when it finds others in their place.
        own = module.__dict__
        recurrent = "_flat_weights_names" in own
        self.flat = {name: own[name] for name in _RNN_ATTRIBUTES if name in own} if recurrent else {}
        self.flat_names: list[str] = own["_flat_weights_names"] if recurrent else []

    def base(self) -> dict[str, Any]:
        """The originals."""
        return {name: dict.__getitem__(self, name) for name in self}

    def _overlay(self) -> Weights | None:
        """What was lent to this thread last."""
        stack = self.overlays.get(get_ident())
        return stack[-1] if stack else None

    def __getitem__(self, name: str) -> Any:
        overlay = self._overlay()
        if overlay is not None and name in overlay:
            weight = overlay[name]
            if type(weight) is Later:
                weight = overlay[name] = weight.make()
            elif type(weight) is Awaited:
                weight = dict.__getitem__(self, name) if weight.weight is None else weight.weight
            elif type(weight) is Brought:
                weight = weight.see(dict.__getitem__(self, name))
            return weight
        return dict.__getitem__(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  # this is the `get`

    def _seen(self) -> dict[str, Any]:
        return {name: self[name] for name in self}

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # a view of this thread's weights
        return self._seen().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # a view of this thread's weights
        return self._seen().values()

    def copy(self) -> dict[str, Any]:
        return self._seen()

    def __setitem__(self, name: str, value: Any) -> None:
        overlay = self._overlay()
        if overlay is not None and name in overlay and isinstance(value, Tensor):
            if type(overlay[name]) is Awaited:
                overlay[name].take(value)
                return
            if type(overlay[name]) is Brought:
                dict.__setitem__(self, name, value)
                self.original[name] = value
                self._bring_flat(name, value)
                overlay[name].drop()
                return
            # torch.func.functional_call swaps tensors in and out; a Parameter that stays is kept by `settle`.
            overlay[name] = value
            return
        dict.__setitem__(self, name, value)
        self.original[name] = value
        if overlay is not None:
            overlay.pop(name, None)

    def _bring_flat(self, name: str, value: Tensor) -> None:
        """An RNN's own list of weights, which it will get back, has what FSDP has put in place."""
        names = self.flat_names
        if name in names and "_flat_weights" in self.flat:
            self.flat["_flat_weights"][names.index(name)] = value
            if "_flat_weight_refs" in self.flat:
                self.flat["_flat_weight_refs"][names.index(name)] = weakref.ref(value)

    def __delitem__(self, name: str) -> None:
        dict.__delitem__(self, name)
        self.original.pop(name, None)
        for stack in list(self.overlays.values()):
            for overlay in stack:
                overlay.pop(name, None)

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self:
            return dict.pop(self, name, *default)
        value = self[name]
        del self[name]
        return value

    def update(self, *others: Any, **named: Any) -> None:
        for name, value in dict(*others, **named).items():
            self[name] = value

    def settle(self, overlay: Weights) -> None:
        """Keep a Parameter that forward assigned over a lent weight and did not take away again."""
        for name, value in overlay.items():
            # Asking a Parameter's class is slow: nearly all are what was lent.
            if type(value) not in _LENT and isinstance(value, nn.Parameter):
                dict.__setitem__(self, name, value)
                self.original[name] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.base(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.base(), memo)


def originals(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters by name, whatever is lent."""
    own = module.__dict__
    params: dict[str, Any] = own.get(FORMER) or own["_parameters"]
    return params.base() if isinstance(params, Lent) else params


def freeze(cache: dict[Any, Any], param: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A parameter, cast once for as long as the cache lives."""
    assert dtype is not None
    if (id(param), dtype) not in cache:
        cache[id(param), dtype] = param, param.detach().to(dtype)
    frozen: Tensor = cache[id(param), dtype][1]
    return frozen


def lend(module: nn.Module, weights: Weights) -> None:
    """Let this thread see `weights` in place of the module's parameters of the same names, until `take_back`.

    Args:
        module: the module.
        weights: tensors by parameter name.
    """
    if FORMER in module.__dict__:
        # One thread's own, and plain attributes, which have to be made at once.
        for name, weight in weights.items():
            module.__dict__[name] = weight.make() if type(weight) is Later else weight
        return
    with _installing:
        params = module.__dict__["_parameters"]
        if not isinstance(params, Lent):
            params = module.__dict__["_parameters"] = Lent(module)
        params.overlays.setdefault(get_ident(), []).append(weights)


def take_back(module: nn.Module, weights: Weights) -> None:
    """Undo `lend`; the last thread to do so puts the module's own dict back. A second call does nothing."""
    if FORMER in module.__dict__:
        module.__dict__.update({name: module.__dict__[FORMER][name] for name in weights})
        return
    with _installing:
        params = module.__dict__["_parameters"]
        if not isinstance(params, Lent):
            return
        here = get_ident()
        stack = params.overlays.get(here, [])
        kept = [lent for lent in stack if lent is not weights]
        if len(kept) < len(stack):
            params.settle(weights)
            if kept:
                params.overlays[here] = kept
                return
            del params.overlays[here]
        # Also where an earlier call was interrupted just here.
        if not params.overlays:
            if params.flat:
                module.__dict__.update(params.flat)
            module.__dict__["_parameters"] = params.original
