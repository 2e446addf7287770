"""The names of `apex.fp16_utils`, Apex's tools before `amp`: they can be imported, and say what to do instead."""

from __future__ import annotations

from typing import Any

from wrapprec.migrate.apex.notes import refused

__all__ = [
    "BN_convert_float",
    "DynamicLossScaler",
    "FP16Model",
    "FP16_Optimizer",
    "LossScaler",
    "convert_module",
    "convert_network",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "to_python_float",
    "tofp16",
]

_WEIGHTS = (
    "delete it, keep the model in float32, and call model, optimizer = amp.initialize(model, optimizer, opt_level='O2')"
)
_OPTIMIZER = (
    "delete it, call model, optimizer = amp.initialize(model, optimizer, opt_level='O2'), write loss.backward() for"
    " optimizer.backward(loss), and torch.nn.utils.clip_grad_norm_ for optimizer.clip_master_grads"
)

BN_convert_float = refused("fp16_utils.BN_convert_float", _WEIGHTS)
FP16Model = refused("fp16_utils.FP16Model", _WEIGHTS)
convert_module = refused("fp16_utils.convert_module", _WEIGHTS)
convert_network = refused("fp16_utils.convert_network", _WEIGHTS)
network_to_half = refused("fp16_utils.network_to_half", _WEIGHTS)
tofp16 = refused("fp16_utils.tofp16", _WEIGHTS)
prep_param_lists = refused("fp16_utils.prep_param_lists", _WEIGHTS)
model_grads_to_master_grads = refused("fp16_utils.model_grads_to_master_grads", _WEIGHTS)
master_params_to_model_params = refused("fp16_utils.master_params_to_model_params", _WEIGHTS)
FP16_Optimizer = refused("fp16_utils.FP16_Optimizer", _OPTIMIZER)
LossScaler = refused("fp16_utils.LossScaler", _OPTIMIZER)
DynamicLossScaler = refused("fp16_utils.DynamicLossScaler", _OPTIMIZER)


def to_python_float(t: Any) -> float:
    """Read a number.

    Args:
        t: a tensor or a sequence of one element.

    Returns:
        The number.

    >>> to_python_float([2.5])
    2.5
    """
    return float(t.item() if hasattr(t, "item") else t[0])
