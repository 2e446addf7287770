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


Settings = tuple[bool, bool, torch.dtype]
"""Of a context of autocast: whether it is on, whether casts of weights are kept, and the low precision dtype."""


class _Entered:
    """A context of autocast, and one that was on before if there is one: to make it takes as long as to enter it.

    Args:
        region: whose it is.
        kind: the type of device.
        settings: of the context.
    """

    __slots__ = ("inner", "kind", "region", "settings")

    def __init__(self, region: Region, kind: str, settings: Settings) -> None:
        self.region = region
        self.kind = kind
        self.settings = settings

    def __enter__(self) -> None:
        # Torch drops the casts that it kept when the outermost context ends. That may be one around the user's loop,
        # even one that is off or of another device, and the steps of the optimizer within it would go unseen.
        if self.settings[1]:
            torch.clear_autocast_cache()
        # Not in the list while it is on: it holds what was on before, and regions nest, on several threads too.
        try:
            self.inner = self.region.idle[self.kind, self.settings].pop()
        except (KeyError, IndexError):
            self.inner = _made(self.kind, self.settings)
        self.inner.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.inner.__exit__(*raised)
        self.region.idle.setdefault((self.kind, self.settings), []).append(self.inner)
        if self.settings[1]:
            torch.clear_autocast_cache()


def _made(kind: str, settings: Settings) -> torch.autocast:
    enabled, cache, dtype = settings
    return torch.autocast(kind, dtype=dtype if enabled else None, enabled=enabled, cache_enabled=cache)


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
        # Contexts that are not on, by type of device and settings.
        self.idle: dict[tuple[str, Settings], list[torch.autocast]] = {}

    def context(self, traced: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Autocast as this region wants it; nothing where it is so already.

        Args:
            traced: by dynamo, which is to see a context that is made, and keeps no casts.
        """
        if not self.others:
            return self._autocast(self.device_type, traced)
        stack = contextlib.ExitStack()
        for kind in (self.device_type, *self.others):
            stack.enter_context(self._autocast(kind, traced))
        return stack

    def _autocast(self, kind: str, traced: bool) -> contextlib.AbstractContextManager[Any]:
        if self.autocasts:
            assert self.low is not None
            # Inside the user's autocast the cache outlives the forward, and the optimizer's step would go unseen.
            outer = traced or torch.is_autocast_enabled(kind)
            settings = True, self.caches and not outer and torch.is_autocast_cache_enabled(), self.low
        elif torch.is_autocast_enabled(kind):
            # What is left as it is around: the user's own autocast inside of this one takes it over.
            settings = False, torch.is_autocast_cache_enabled(), torch.get_autocast_dtype(kind)
        else:
            return _NOTHING
        return _made(kind, settings) if traced else _Entered(self, kind, settings)

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
        return {**self.__dict__, "idle": {}}
