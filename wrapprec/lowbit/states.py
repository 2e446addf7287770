"""The state of an optimizer whose parameters changed their dtype: float32 where weights are rounded, and back."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wrapprec.dtypes import LOW, REAL
from wrapprec.lowbit.codes import is_low, quantise


def cast_state(state: dict[str, Any], dtype: torch.dtype, among: frozenset[torch.dtype] = REAL) -> dict[str, Any]:
    """Cast the floating tensors of one parameter's state, in place; `step` and scalars are counts, and stay.

    What is quantised keeps its codes, which then mean numbers of that dtype.

    Args:
        state: of one parameter.
        dtype: the wanted dtype.
        among: the dtypes that are cast.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.dtype in among and value.dtype is not dtype:
            state[key] = value.to(dtype)
        elif is_low(value) and value["dtype"] in among:
            state[key] = {**value, "dtype": dtype}
    return state


def widen_state(state: dict[str, Any]) -> dict[str, Any]:
    """Make float32 of what is low precision: bfloat16 moments stall as bfloat16 weights do."""
    return cast_state(state, torch.float32, LOW)


def load_wide(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Take the float32 state of low precision parameters as it was saved: torch has cast it to their dtype.

    Args:
        optimizer: its `load_state_dict(saved)` was just called.
        saved: its state dict.
    """
    params = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
    for number, param in zip(numbers, params, strict=True):
        if param.dtype in LOW and number in saved["state"] and param in optimizer.state:
            _take(optimizer.state[param], saved["state"][number], param.device)
            widen_state(optimizer.state[param])


def _take(state: Any, saved: Any, device: torch.device) -> None:
    """Replace, at any depth, the floating tensors that were narrowed."""
    for key, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
        if isinstance(state, dict) and key not in state:
            if isinstance(value, dict):  # bitsandbytes saves a part of a state by itself, and loads it into the whole
                _take(state, value, device)
        elif isinstance(value, Tensor) and isinstance(state[key], Tensor):
            if state[key].dtype in LOW and value.dtype in REAL - LOW:
                state[key] = value.detach().to(device, torch.float32, copy=True)
        elif isinstance(value, Tensor) and is_low(state[key]):
            low = state[key]  # of the narrowed numbers
            state[key] = quantise(value.detach().to(device, torch.float32), low["bits"], low["signed"])
        elif isinstance(value, (dict, list)) and type(value) is type(state[key]):
            _take(state[key], value, device)  # otherwise it was quantised, or given back, when it was loaded
