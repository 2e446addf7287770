"""Saving and loading quantised weights, under the keys that bitsandbytes and transformers use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wrapprec.errors import message
from wrapprec.lowbit.eightbits import Linear8
from wrapprec.lowbit.products import Quantised, library
from wrapprec.lowbit.quantisable import is_packed
from wrapprec.standin import forward_of


def save_packed(module: Any, state: dict[str, Any], prefix: str, local: dict[str, Any]) -> None:
    """Save what the weight of an embedding or a Conv1D needs to be read; bitsandbytes' layers do so themselves."""
    if not is_packed(module.weight):
        return
    if module.weight.dtype is torch.int8:
        state[f"{prefix}SCB"] = module.weight.SCB.detach()
        state[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)
        return
    for key, value in module.weight.quant_state.as_dict(packed=True).items():
        state[f"{prefix}weight.{key}"] = value.detach()


def load_packed(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    local: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load a quantised weight, or quantise the plain one that is given, before torch copies what is left.

    A hook for `register_load_state_dict_pre_hook`. What it takes is left as the weight that the module has by then,
    so that torch's copy changes nothing.
    """
    key = f"{prefix}weight"
    runner = getattr(forward_of(module), "runner", None)
    weight: Any = module._parameters["weight"]
    if not isinstance(runner, Quantised) or weight is None or weight.is_floating_point():
        return
    parts = {name: state.pop(name) for name in list(state) if name.startswith(f"{key}.")}
    for name in ("SCB", "weight_format"):
        if prefix + name in state:
            parts[prefix + name] = state.pop(prefix + name)
    if key not in state:
        if parts and strict:
            errors.append(_problem(runner, prefix, module, f"{', '.join(parts)} without {key!r}"))
        return
    given: Tensor = state[key]
    state[key] = weight
    if given.is_floating_point():
        shape = runner.shape(weight)
        if tuple(given.shape) != (shape[::-1] if runner.transposed else shape) or parts:
            errors.append(_problem(runner, prefix, module, f"a float weight of shape {tuple(given.shape)}"))
        elif not torch.isfinite(given).all():
            errors.append(_problem(runner, prefix, module, "a weight with inf or nan"))
        else:
            _take(weight, runner.store(given.to(weight.device, runner.parameter.dtype)))
        return
    relative = {name.removeprefix(f"{key}.").removeprefix(prefix): value for name, value in parts.items()}
    found = _read(runner, runner.shape(weight), given, relative, weight.device)
    if found is None:
        errors.append(
            _problem(runner, prefix, module, f"a packed weight with {', '.join(sorted(relative)) or 'nothing'}")
        )
    else:
        _take(weight, found)


def _read(runner: Quantised, shape: tuple[int, int], given: Tensor, parts: dict[str, Any], device: torch.device) -> Any:
    """The parameter that was saved, if it is of this shape and format."""
    layers = library(runner.form).nn
    if isinstance(runner, Linear8):
        scales = parts.get("SCB")
        if scales is None or given.dtype != torch.int8 or tuple(given.shape) != shape or scales.shape != shape[:1]:
            return None
        codes = given.to(device, copy=True)
        scales = scales.to(device, torch.float32, copy=True)
        return layers.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    if f"quant_state.bitsandbytes__{runner.form[:3]}" not in parts or given.dtype != torch.uint8:
        return None
    if ("nested_absmax" in parts) != runner.form.endswith("-dq"):
        return None
    copied = {name: value.to(device, copy=True) for name, value in parts.items()}
    found = layers.Params4bit.from_prequantized(given.to(device, copy=True), copied, device=device)
    return found if tuple(found.quant_state.shape) == shape and given.numel() * 2 >= shape[0] * shape[1] else None


def _take(weight: Any, found: Any) -> None:
    """Put what was found into the parameter that the module has, which others may hold."""
    weight.data = found.data
    for name in ("quant_state", "CB", "SCB"):
        if name in found.__dict__:
            setattr(weight, name, getattr(found, name))


def _problem(runner: Quantised, prefix: str, module: nn.Module, received: str) -> str:
    shape = runner.shape(module._parameters["weight"])
    shape = shape[::-1] if runner.transposed else shape
    return message(
        f"a float weight of shape {shape}, or one saved as {runner.form}, for {prefix + 'weight'!r}",
        received,
        remedy="wrap with the policy that it was saved under, or load a float32 checkpoint",
    )
