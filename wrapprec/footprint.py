"""How much state an optimizer keeps for a parameter, foreseen by one step of a parameter that has no storage."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from wrapprec.dtypes import MIXABLE
from wrapprec.errors import PolicyError, message, nearest
from wrapprec.lowbit.forms import form_of
from wrapprec.lowbit.sizes import FEWEST, code_bytes

Shape = tuple[int, ...]


def state_of(
    optimizer: Optimizer | type[Optimizer] | str, bits: int | None = None
) -> Callable[[Shape, torch.dtype, bool], float]:
    """Say how many bytes of state an optimizer keeps for a parameter, by having it step one without storage.

    Args:
        optimizer: an optimizer, its class, or the name of one of torch's.
        bits: what the state is quantised to, as `optimizer_bits`; None for as it is.

    Returns:
        Bytes, by shape, dtype, and whether the parameter is an embedding's; step counters are not counted.

    Raises:
        PolicyError: no optimizer of that name, or one whose state is not made parameter by parameter.

    >>> state_of("AdamW")((100, 100), torch.float32, False), state_of("AdamW", 8)((100, 100), torch.float32, False)
    (80000.0, 20320.0)
    """
    make = _maker(optimizer)

    @functools.cache
    def measure(shape: Shape, dtype: torch.dtype, embeds: bool) -> float:
        # Some read their own numbers on the host, which parameters without storage do not allow.
        for device in ("meta", "cpu"):
            param = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            param.grad = torch.zeros_like(param)
            try:
                stepped = make(param)
                stepped.step()
            except Exception as error:  # whatever somebody's optimizer raises
                last = error
                continue
            small = embeds or param.numel() < FEWEST or dtype not in MIXABLE
            form = {} if bits is None or small else form_of(stepped, bits)
            state = {key: s for key, s in stepped.state[param].items() if isinstance(s, torch.Tensor) and s.shape != ()}
            return float(sum(code_bytes(bits or 0, s.numel()) if key in form else s.nbytes for key, s in state.items()))
        raise PolicyError(
            message(
                "an optimizer whose state can be foreseen by one step of one parameter",
                f"{optimizer!r}, which raised {type(last).__name__}: {last}",
                remedy="name one that keeps as much state, e.g. memory(optimizer='AdamW')",
            )
        )

    return measure


def _maker(optimizer: Optimizer | type[Optimizer] | str) -> Callable[[torch.nn.Parameter], Optimizer]:
    if isinstance(optimizer, Optimizer):
        # Some make their state when they are built, so a copy with another parameter would not do.
        taken = inspect.signature(type(optimizer)).parameters
        group = {key: value for key, value in optimizer.param_groups[0].items() if key in taken and key != "params"}
        plain = {"fused": False, "foreach": False, "capturable": False}
        options = group | {key: value for key, value in plain.items() if key in group}
        return functools.partial(_build, type(optimizer), options)
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        kind: Any = optimizer
    else:
        names = {k.lower(): k for k, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, Optimizer)}
        found = names.get(optimizer.lower()) if isinstance(optimizer, str) else None
        if found is None:
            hint = nearest(str(optimizer).lower(), names)
            raise PolicyError(
                message(
                    "an optimizer, its class, or the name of one of torch.optim's",
                    f"{optimizer!r} (of type {type(optimizer).__name__})",
                    remedy=f"{hint}write e.g. 'AdamW' or 'SGD'",
                )
            )
        kind = getattr(torch.optim, found)
    return functools.partial(_build, kind, {})


def _build(kind: Any, options: dict[str, Any], param: torch.nn.Parameter) -> Any:
    return kind([param], **options)
