"""What holds inside a region, a maximal run of modules with one precision: which casts happen at its borders."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from wrapprec.cast import cast_tree, lower
from wrapprec.modes import cache_is_sound
from wrapprec.policy import Precision

_DOUBLE = frozenset({torch.float64})
_NOTHING = contextlib.nullcontext()

_NUMBERS = (bool, int, float)


class _Reused:
    """A context of autocast that was on before: to make one takes as long as to enter it.

    Args:
        region: whose dtype and device it has.
        cache: whether casts of weights are kept; None where autocast is switched off.
    """

    __slots__ = ("cache", "inner", "region")

    def __init__(self, region: Region, cache: bool | None) -> None:
        self.region = region
        self.cache = cache

    def __enter__(self) -> None:
        # Not in the list while it is on: it holds what was on before, and regions nest, on several threads too.
        try:
            self.inner = self.region.idle[self.cache].pop()
        except IndexError:
            self.inner = self.region.autocast(self.cache)
        self.inner.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.inner.__exit__(*raised)
        self.region.idle[self.cache].append(self.inner)


class Region:
    """What holds inside one precision.

    Args:
        precision: the placement's.
        device_type: for autocast.
        others: types of device that other parts of the model are on: autocast is the same there.
        restores: float32 inside, and outputs given back in the dtype around it (a hand-written norm).
        upcasts: a float32 region raises what comes in.
        among: the dtypes that it casts.
    """

    def __init__(
        self,
        precision: Precision,
        device_type: str,
        restores: bool,
        upcasts: bool,
        among: Any,
        others: tuple[str, ...] = (),
    ) -> None:
        self.precision = precision
        self.device_type = device_type
        self.others = others
        self.restores, self.among = restores, among
        self.autocasts = precision.casting == "op"
        self.caches = cache_is_sound()
        self.low = None if precision.casting is None else precision.activation_dtype
        self.output_dtype: Any = precision.output_dtype
        self.casts = precision.casts_inputs if self.low is not None else upcasts
        self.high = precision.activation_dtype if self.low is None else torch.float32
        # Autocast leaves float64 alone, so that beside float64 parts a region under it takes their activations over.
        self.narrows = self.autocasts and not self.casts and torch.float64 in among
        self.by_module = (precision.casting == "module" or self.high is torch.float64) and self.casts
        # Contexts that are not on.
        self.idle: dict[bool | None, list[torch.autocast]] = {True: [], False: [], None: []}

    def context(self, reuse: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Autocast as this region wants it; nothing where it is so already.

        Args:
            reuse: take one that was on before; dynamo, which makes no calls, is to see one that is made.
        """
        if not self.others:
            return self._autocast(self.device_type, reuse)
        stack = contextlib.ExitStack()
        for kind in (self.device_type, *self.others):
            stack.enter_context(self._autocast(kind, reuse=False))
        return stack

    def _autocast(self, kind: str, reuse: bool) -> contextlib.AbstractContextManager[Any]:
        cache = None
        if self.autocasts:
            # Inside the user's autocast the cache outlives the forward, and the optimizer's step would go unseen.
            outer = torch.is_autocast_enabled(kind)
            cache = self.caches and not outer and torch.is_autocast_cache_enabled()
        elif not torch.is_autocast_enabled(kind):
            return _NOTHING
        return _Reused(self, cache) if reuse else self.autocast(cache, kind)

    def autocast(self, cache: bool | None, kind: str | None = None) -> torch.autocast:
        """A new context: on, with its cache or without, or off."""
        if cache is None:
            return torch.autocast(kind or self.device_type, enabled=False)
        return torch.autocast(kind or self.device_type, dtype=self.low, cache_enabled=cache)

    def is_cast(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there may be something to cast: most modules are given tensors that have the dtype already."""
        wanted = self.low or self.high
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) is Tensor:
                dtype = value.dtype
                if dtype is not wanted and dtype in self.among:
                    return True
            elif value is not None and type(value) not in _NUMBERS:
                return True
        return False

    def cast_inputs(self, tree: Any, on_cast: Any = None) -> Any:
        """Cast what comes in: to the compute dtype, or up to float32."""
        if self.narrows:
            return cast_tree(tree, self.high, on_cast, among=_DOUBLE)
        return cast_tree(tree, self.low or self.high, on_cast, lower, self.among)

    def meets(self, around: Region | None) -> bool:
        """Whether what comes from the region `around` is float64, which autocast would leave alone."""
        return around is not None and around.high is torch.float64

    def give_back(self, out: Any, around: Region) -> Any:
        """Cast what goes out into the region `around`."""
        if self.low is not None:
            out = cast_tree(out, self.output_dtype)
            return out if around.high is not torch.float64 else cast_tree(out, around.high, among=self.among)
        if around.high is not self.high:  # float64 meets another
            return cast_tree(out, around.low or around.high, among=self.among)
        low = around.low if self.restores and around.by_module else None
        return out if low is None else cast_tree(out, low)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "idle": {True: [], False: [], None: []}}
