"""What holds inside a region, a maximal run of modules with one precision: which casts happen at its borders."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from wrapprec.cast import cast_tree, lower
from wrapprec.modes import cache_is_sound
from wrapprec.policy import Precision

_DOUBLE = frozenset({torch.float64})
_NOTHING = contextlib.nullcontext()


class Region:
    """What holds inside one precision.

    Args:
        precision: the placement's.
        device_type: for autocast.
        restores: float32 inside, and outputs given back in the dtype around it (a hand-written norm).
        upcasts: a float32 region raises what comes in.
        among: the dtypes that it casts.
    """

    def __init__(self, precision: Precision, device_type: str, restores: bool, upcasts: bool, among: Any) -> None:
        self.precision = precision
        self.device_type = device_type
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

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as this region wants it; nothing where it is so already."""
        if self.autocasts:
            # Inside the user's autocast the cache outlives the forward, and the optimizer's step would go unseen.
            outer = torch.is_autocast_enabled(self.device_type)
            cache = self.caches and not outer and torch.is_autocast_cache_enabled()
            return torch.autocast(self.device_type, dtype=self.low, cache_enabled=cache)
        if torch.is_autocast_enabled(self.device_type):
            return torch.autocast(self.device_type, enabled=False)
        return _NOTHING

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
