"""Change the dtype of the floating tensors in a tree; nothing else casts activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wrapprec.dtypes import LOW, MIXABLE
from wrapprec.reach import mend, opaque_in, tensors_in
from wrapprec.sharded import is_distributed_tensor
from wrapprec.tree import map_tensors

__all__ = ["cast_tree", "lower", "map_tensors", "mend", "narrow", "opaque_in", "tensors_in"]

_FILL = 1e9
"""A finite number as far below zero as this is no data but stands for minus infinity, in a mask."""


def cast_tree(
    tree: Any,
    dtype: torch.dtype,
    on_cast: Callable[[Tensor, Tensor], object] | None = None,
    convert: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
    among: frozenset[torch.dtype] = MIXABLE,
) -> Any:
    """Cast every float32, float16 and bfloat16 tensor in a tree.

    Everything else stays the same object, and so does the tree when nothing has to be cast. A tensor that occurs
    twice is cast once, so that `query is key` still holds. A `Parameter` gives a plain tensor.

    Args:
        tree: tensors in tuples, lists, dicts, namedtuples, dataclasses and their subclasses, to any depth.
        dtype: the wanted dtype.
        on_cast: called with the tensor before and the tensor after each cast.
        convert: casts one tensor.
        among: the dtypes that are cast.

    Returns:
        A tree of the same types; the one given when nothing changed.

    >>> cast_tree({"x": torch.ones(2), "n": 3}, torch.bfloat16)
    {'x': tensor([1., 1.], dtype=torch.bfloat16), 'n': 3}
    """

    def cast(tensor: Tensor) -> Tensor:
        before = tensor.dtype
        if before is dtype or before not in among:
            return tensor
        after = convert(tensor, dtype)
        if on_cast is not None:
            on_cast(tensor, after)
        return after

    return map_tensors(cast, tree)


def narrow(mask: Tensor, dtype: torch.dtype, least: float = 0.0) -> Tensor:
    """Raise the finite fills of a float32 mask that a cast would make infinite, and leave its dtype.

    A row of a mask that is filled throughout gives equal weights, where minus infinity gives nan. The new value is half
    the lowest one, so that the sum of two masks is still finite.

    Args:
        mask: any tensor; one that requires grad, or of another dtype than float32, is given back as it is.
        dtype: what it will be cast to.
        least: how large a negative number is to be a fill, too.

    Returns:
        A tensor of the same shape and dtype.

    >>> narrow(torch.tensor([0.0, -1e9, -torch.inf]), torch.float16)
    tensor([     0., -32752.,    -inf])
    """
    if mask.dtype is not torch.float32 or mask.requires_grad or dtype not in LOW:
        return mask
    if mask.is_nested or mask.layout is not torch.strided:
        return mask
    lowest = torch.finfo(dtype).min
    highest = min(lowest, -least)
    if torch._C._get_tracing_state() is not None or is_distributed_tensor(mask):
        # The exporter of TorchScript to ONNX has neither isneginf nor threshold; DTensors (2.9) have no threshold.
        return mask.masked_fill((mask <= highest) & (mask > -torch.inf), lowest / 2)
    # Three kernels without a scalar operand, which each would have to be cast.
    return torch.where(mask.isneginf(), mask, functional.threshold(mask, highest, lowest / 2))


def lower(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an input of a module: one that requires no gradient may be a mask, see `narrow`.

    Args:
        tensor: floating, of any shape.
        dtype: the wanted dtype.

    Returns:
        The tensor in that dtype.

    >>> lower(torch.tensor([-1e9, -1e6, -torch.inf]), torch.float16)
    tensor([-32752.,    -inf,    -inf], dtype=torch.float16)
    """
    return narrow(tensor, dtype, _FILL).to(dtype)
