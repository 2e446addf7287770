"""From a device to its backend, and to the policy that `auto` means there."""

from __future__ import annotations

import functools
import os

import torch
from torch import nn

from wrapprec.backends.base import Backend
from wrapprec.backends.cpu import CpuBackend
from wrapprec.backends.cuda import CudaBackend
from wrapprec.backends.generic import GenericBackend, is_accelerator
from wrapprec.backends.xla import XlaBackend
from wrapprec.errors import PolicyError, message, module_label
from wrapprec.policy import Policy

_BACKENDS: dict[str, type[Backend]] = {"cpu": CpuBackend, "cuda": CudaBackend, "xla": XlaBackend}
_LAUNCHER = "ACCELERATE_MIXED_PRECISION"
_LAUNCHED = {"fp16": "16-mixed", "bf16": "bf16-mixed", "fp8": "fp8-mixed"}


@functools.cache
def _instance(kind: str) -> Backend:
    return _BACKENDS[kind]() if kind in _BACKENDS else GenericBackend(kind)


def backend_for(device: torch.device | str) -> Backend:
    """Find the backend of a device.

    Args:
        device: a device or its name.

    Returns:
        The one instance for that device type; it remembers its probes.

    Raises:
        PolicyError: there is none for that device type.

    >>> backend_for("cpu").name
    'cpu'
    """
    kind = torch.device(device).type
    if kind not in _BACKENDS and not is_accelerator(kind):
        raise PolicyError(
            message(
                f"a device of a supported type ({', '.join(_BACKENDS)}, or another that torch.autocast knows)",
                f"{device}",
                remedy="move the model to one of these before wrapping it",
            )
        )
    return _instance(kind)


def auto_policy(device: torch.device | str) -> tuple[Policy, str]:
    """Choose the policy that `auto` means on a device.

    accelerate's launcher announces its mixed precision in an environment variable; where it did (`no` means not
    set), that is followed.

    Args:
        device: where the model is.

    Returns:
        The policy, and the reason for the plan to show.

    Raises:
        PolicyError: there is no backend for the device, or nobody there to ask.
    """
    launched = os.environ.get(_LAUNCHER, "").strip().lower()
    if launched in _LAUNCHED:
        backend_for(device)
        return Policy.parse(_LAUNCHED[launched]), f"accelerate's launcher set {_LAUNCHER}={launched}"
    spelling, reason = backend_for(device).auto(torch.device(device))
    return Policy.parse(spelling), reason


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate brings the offloaded weights of a module when it is called, or None."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None and getattr(one, "offload", False):
            return torch.device(device)
    return None


def device_of(model: nn.Module) -> torch.device:
    """The device of the first tensor that has storage: offloading leaves some of them on the meta device.

    Args:
        model: any module.

    Returns:
        Where its tensors are, or will be brought; a CPU where it has none.

    Raises:
        PolicyError: all of them are on the meta device.

    >>> device_of(nn.Linear(2, 2))
    device(type='cpu')
    """
    empty = True
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                if not tensor.is_meta:
                    return tensor.device
                empty = False
    offloaded = (execution_device(module) for module in model.modules())
    device = next((device for device in offloaded if device is not None), None)
    if empty or device is not None:
        return device or torch.device("cpu")
    raise PolicyError(
        message(
            "a model whose parameters have storage",
            "a model on the meta device",
            where=module_label("", model),
            remedy="materialise it first (model.to_empty, then load its weights); to plan only, pass device=",
        )
    )


def other_types(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """The types of device, besides one, that parameters of a model are on: it may be spread over several.

    Args:
        model: any module.
        device: that of the plan.

    Returns:
        Their names, sorted; almost always none.

    >>> other_types(nn.Linear(2, 2), torch.device("cuda", 0))
    ('cpu',)
    """
    return tuple(sorted({param.device.type for _, param in nn.Module.named_parameters(model)} - {device.type, "meta"}))
