"""The names of `apex.fp16_utils`, Apex's tools before `amp`: float16 weights, and float32 copies for the optimizer.

They do by hand what the policy `16-module` does, on torch's own operations, and know nothing of wrapped models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as clip_grad_norm

from wrapprec.cast import cast_tree
from wrapprec.errors import WrapprecError, message
from wrapprec.migrate.apex.masters import (
    FP16_Optimizer,
    master_params_to_model_params,
    model_grads_to_master_grads,
)
from wrapprec.migrate.apex.scalers import DynamicLossScaler, LossScaler

__all__ = [
    "BN_convert_float",
    "DynamicLossScaler",
    "FP16Model",
    "FP16_Optimizer",
    "LossScaler",
    "clip_grad_norm",
    "convert_module",
    "convert_network",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "to_python_float",
    "tofp16",
]


def convert_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating parameters and buffers of one module, and none below it, in place.

    Args:
        module: whose own.
        dtype: any floating one.
    """
    for tensor in [*module._parameters.values(), *module._buffers.values()]:
        if tensor is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
            if tensor.grad is not None:
                tensor.grad.data = tensor.grad.data.to(dtype)


def convert_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model in place, but for batch normalisation with parameters, which stays as it is.

    Args:
        network: the model.
        dtype: any floating one.

    Returns:
        The model.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            continue
        convert_module(module, dtype)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return network


def BN_convert_float(module: nn.Module) -> nn.Module:
    """Bring batch normalisation with parameters back to float32, in place.

    Args:
        module: the model.

    Returns:
        The model.
    """
    for one in module.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.affine:
            one.float()
    return module


class tofp16(nn.Module):
    """Casts its input to float16."""

    def forward(self, input: Tensor) -> Tensor:
        """Cast one tensor of any shape."""
        return input.half()


def network_to_half(network: nn.Module) -> nn.Module:
    """Make a model float16, batch normalisation excepted, and cast its input.

    Args:
        network: the model, changed in place.

    Returns:
        A Sequential of the cast and the model, as in Apex: names in its `state_dict` begin with ``1.``.

    >>> network_to_half(nn.Linear(2, 1))(torch.ones(3, 2)).dtype
    torch.float16
    """
    return nn.Sequential(tofp16(), BN_convert_float(convert_network(network, torch.float16)))


class FP16Model(nn.Module):
    """A float16 model whose floating inputs are cast.

    Args:
        network: the model, changed in place; batch normalisation stays in float32.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = convert_network(network, torch.float16)

    def forward(self, *inputs: Any) -> Any:
        """Call the model."""
        return self.network(*cast_tree(inputs, torch.float16))


def prep_param_lists(model: nn.Module, flat_master: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Copy the trainable parameters of a model to float32, for an optimizer.

    Args:
        model: any.
        flat_master: one float32 tensor for all of them.

    Returns:
        The model's parameters, and their copies.

    Raises:
        WrapprecError: one flat copy of parameters of several dtypes.

    >>> model = nn.Linear(2, 1).half()
    >>> model_params, master_params = prep_param_lists(model)
    >>> [param.dtype for param in master_params]
    [torch.float32, torch.float32]
    """
    params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
    if not flat_master:
        return params, [nn.Parameter(_copied(param)) for param in params]
    if len({param.dtype for param in params}) > 1:
        found = sorted({str(param.dtype) for param in params})
        remedy = "call prep_param_lists(model), without flat_master=True"
        received = " and ".join(found)
        raise WrapprecError(message("parameters of one dtype with flat_master=True", received, remedy=remedy))
    flat = nn.Parameter(torch.cat([_copied(param).flatten() for param in params]))
    flat.grad = torch.zeros_like(flat)
    return params, [flat]


def _copied(param: Tensor) -> Tensor:
    return param.detach().clone().float()


def to_python_float(t: Any) -> float:
    """Read a number.

    Args:
        t: a tensor or a sequence of one element.

    Returns:
        The number.

    >>> to_python_float([2.5])
    2.5
    """
    found: Sequence[Any] | Any = t
    return float(found.item() if hasattr(found, "item") else found[0])
