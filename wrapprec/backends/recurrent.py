"""Whether torch's recurrent kernels run in a low precision on a device, found out by trying them once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from wrapprec.backends import ABSENT

_KINDS: dict[str, Callable[..., nn.RNNBase]] = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
_WIDTH = 8


def rnn_kind(module: nn.Module) -> str | None:
    """Name the torch network that a module is, or descends from.

    Args:
        module: any module.

    Returns:
        `RNN`, `LSTM`, `GRU` or None. Cells are made of plain linears, which run everywhere.

    >>> rnn_kind(nn.LSTM(2, 2)), rnn_kind(nn.LSTMCell(2, 2))
    ('LSTM', None)
    """
    for kind in type(module).__mro__:
        if kind.__module__ == "torch.nn.modules.rnn" and kind.__name__ in _KINDS:
            return kind.__name__
    return None


def probe_rnn(kind: str, dtype: torch.dtype, autocasts: bool, device: torch.device) -> bool:
    """Run a tiny network of a kind forward and backward; random state, gradient mode and autocast stay as they are.

    Args:
        kind: from `rnn_kind`.
        dtype: float16 or bfloat16.
        autocasts: under autocast with float32 weights, otherwise with weights and inputs in `dtype`.
        device: where.

    Returns:
        True if it ran, with and without gradients, and differed from the float32 result by rounding only.
    """
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        try:
            return all(_agrees(kind, dtype, autocasts, device, grad) for grad in (True, False))
        except (ValueError, *ABSENT):
            return False


def _agrees(kind: str, dtype: torch.dtype, autocasts: bool, device: torch.device, grad: bool) -> bool:
    # From the meta device: the usual initialisation would draw random numbers.
    network = _KINDS[kind](_WIDTH, _WIDTH, device="meta", dtype=torch.float32).to_empty(device=device).train(grad)
    with torch.no_grad():
        for parameter in network.parameters():
            values = torch.linspace(-3, 5, parameter.numel(), device=device, dtype=torch.float32)
            parameter.copy_(values.cos().reshape(parameter.shape) / _WIDTH)
    x = torch.linspace(-2, 2, 3 * 2 * _WIDTH, device=device, dtype=torch.float32).sin().reshape(3, 2, _WIDTH)
    with torch.set_grad_enabled(grad):
        with torch.autocast(device.type, enabled=False):
            true = network(x)[0]
        if not autocasts:
            network, x = network.to(dtype), x.to(dtype)
        with torch.autocast(device.type, dtype=dtype, enabled=autocasts):
            out = network(x)[0]
        if grad:
            out.float().sum().backward()
    # Outputs lie below one and are rounded at every one of three time steps, as are the sums that they are made of.
    return bool(((out.float() - true).abs().max() <= 16 * torch.finfo(dtype).eps).item())
