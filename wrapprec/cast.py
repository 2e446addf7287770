"""Change the dtype of the floating tensors in a tree; nothing else casts activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wrapprec.dtypes import MIXABLE
from wrapprec.reach import mend, opaque_in, tensors_in
from wrapprec.tree import map_tensors

__all__ = ["cast_tree", "map_tensors", "mend", "opaque_in", "tensors_in"]


def cast_tree(tree: Any, dtype: torch.dtype, on_cast: Callable[[Tensor, Tensor], object] | None = None) -> Any:
    """Cast every float32, float16 and bfloat16 tensor in a tree.

    Everything else stays the same object, and so does the tree when nothing has to be cast. A tensor that occurs
    twice is cast once, so that `query is key` still holds. A `Parameter` gives a plain tensor.

    Args:
        tree: tensors in tuples, lists, dicts, namedtuples, dataclasses and their subclasses, to any depth.
        dtype: the wanted dtype.
        on_cast: called with the tensor before and the tensor after each cast.

    Returns:
        A tree of the same types; the one given when nothing changed.

    >>> cast_tree({"x": torch.ones(2), "n": 3}, torch.bfloat16)
    {'x': tensor([1., 1.], dtype=torch.bfloat16), 'n': 3}
    """

    def cast(tensor: Tensor) -> Tensor:
        before = tensor.dtype
        if before is dtype or before not in MIXABLE:
            return tensor
        after = tensor.to(dtype)
        if on_cast is not None:
            on_cast(tensor, after)
        return after

    return map_tensors(cast, tree)
