"""What torch's own recurrent networks and attention need around their forward in low precision.

`install` looks up once, by class, how a module's forward is to be run; for all others it is run as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wrapprec.cast import narrow
from wrapprec.lent import Weights, lend, rnn_turn, take_back

if TYPE_CHECKING:
    from wrapprec.forward import Forward

Runner = Callable[["Forward", tuple[Any, ...], dict[str, Any]], Any]

_MASKS: dict[type[nn.Module], dict[str, int]] = {
    nn.MultiheadAttention: {"key_padding_mask": 3, "attn_mask": 5},
    nn.TransformerEncoderLayer: {"src_mask": 1, "src_key_padding_mask": 2},
}
"""The masks that kernels cast to low precision themselves, and where they stand among the arguments."""


def runner_for(module: nn.Module) -> Runner | None:
    """How to run the forward of one of torch's own modules, if not as it is.

    Args:
        module: any module.

    Returns:
        A function of the module's Forward and the arguments; None for a plain call.

    >>> runner_for(nn.Linear(2, 2)) is None
    True
    """
    if isinstance(module, nn.RNNBase):
        return run_recurrent
    if not any(isinstance(module, kind) for kind in _MASKS):
        return None
    owner = next(kind for kind in type(module).__mro__ if "forward" in kind.__dict__)
    if not owner.__module__.startswith("torch.nn.modules."):
        return None
    return run_attention if isinstance(module, nn.MultiheadAttention) else run_encoder_layer


def run_recurrent(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An RNN keeps its weights in attributes too, which threads must not change at the same time."""
    with rnn_turn:
        return forward.original(*args, **kwargs)


def run_attention(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attention casts float masks itself: what is finite in them stays so."""
    return forward.original(*narrow_masks(forward, args, kwargs), **kwargs)


def run_encoder_layer(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In eval an encoder layer may be one fused kernel, which takes nested tensors in one dtype only."""
    args = narrow_masks(forward, args, kwargs)
    region = forward.region
    source = args[0] if args else kwargs.get("src")
    if region is None or region.low is None or not getattr(source, "is_nested", False):
        return forward.original(*args, **kwargs)
    loans: list[tuple[nn.Module, Weights]] = []
    try:
        for module in forward.module.modules():
            params = module._parameters.items()
            weights = {key: param.detach().to(region.low) for key, param in params if param is not None}
            if weights:
                # Noted first, so that an interrupt in between leaves nothing lent.
                loans.append((module, weights))
                lend(module, weights)
        with torch.autocast(region.device_type, enabled=False):
            if args:
                return forward.original(args[0].to(region.low), *args[1:], **kwargs)
            return forward.original(**{**kwargs, "src": kwargs["src"].to(region.low)})
    finally:
        while loans:
            take_back(*loans.pop())


def narrow_masks(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Bring the float32 masks of attention into the range of the dtype that they will be cast to.

    Args:
        forward: of the module.
        args: its positional arguments.
        kwargs: its keyword arguments; changed in place.

    Returns:
        The positional arguments.
    """
    low = None if forward.region is None else forward.region.low
    if low is None:
        return args
    places = next(places for kind, places in _MASKS.items() if isinstance(forward.module, kind))
    for name, position in places.items():
        mask = kwargs.get(name)
        if isinstance(mask, torch.Tensor):
            kwargs[name] = narrow(mask, low)
        elif position < len(args) and isinstance(args[position], torch.Tensor):
            args = (*args[:position], narrow(args[position], low), *args[position + 1 :])
    return args
