"""Loads state dicts with quantised state, which torch would cast to the dtype of the parameter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from wrapprec.errors import StepError, message
from wrapprec.lowbit.codes import Low, is_low


class Loading:
    """The hooks around one optimizer's `load_state_dict`.

    Args:
        quantise: quantises what was loaded in 32 bits.
    """

    def __init__(self, quantise: Callable[[], None]) -> None:
        self._quantise = quantise
        # By the keys of the state dict: what torch must not see, and these keys in the order of the parameters.
        self._taken: dict[Any, dict[str, Low]] = {}
        self._order: list[Any] = []

    def begin(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Take what is quantised out of what torch is given.

        Raises:
            StepError: the state is bitsandbytes' own.
        """
        self._taken, state = {}, {}
        self._order = [key for group in saved["param_groups"] for key in group["params"]]
        for key, values in saved["state"].items():
            named = values if isinstance(values, dict) else {}
            if "__bnb_optimizer_quant_state__" in named or "state1" in named:
                raise StepError(
                    message(
                        f"the state of a {type(optimizer).__name__}, in 32 bits or as wrapprec quantised it",
                        "the state of an optimizer of bitsandbytes",
                        where=f"state[{key!r}]",
                        remedy="load it into that optimizer, and give it to wrap without optimizer_bits",
                    )
                )
            low = {name: value for name, value in named.items() if is_low(value)}
            state[key] = {name: v for name, v in values.items() if name not in low} if low else values
            if low:
                self._taken[key] = low
        return {**saved, "state": state}

    def end(self, optimizer: Optimizer) -> None:
        """Put it where it belongs, as a copy, on the device of the parameter."""
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for key, param in zip(self._order, params, strict=True):
            for name, low in self._taken.get(key, {}).items():
                copy = {part: low[part].to(param.device, copy=True) for part in ("codes", "absmax")}
                # As torch has it, but that float32 state of low precision weights stays so.
                wider = torch.promote_types(low["dtype"], param.dtype)
                optimizer.state[param][name] = {**low, **copy, "dtype": wider}
        self._taken, self._order = {}, []
        self._quantise()
