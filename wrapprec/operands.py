"""Mends the operations of hand-written code that are right in float32 and fail, or lose too much, in low precision.

They are few: adding at indices into a tensor of another dtype; and under module casting a product with something that a
float32 buffer or mask has met, or of `x.float()` with a lent weight, and a loss that a model computes itself. Modules
whose source or buffers show such code run under a mode that mends these operations alone; the modules below them, and
all others, run without. (Masks filled past a dtype's range are the business of `fills`.)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wrapprec.allowlist import is_torch_own, source_of
from wrapprec.cast import cast_tree, tensors_in
from wrapprec.current import thread
from wrapprec.dtypes import MIXABLE
from wrapprec.island import fill

if TYPE_CHECKING:
    from wrapprec.forward import Forward
    from wrapprec.scope import Scope

_UPCASTS = re.compile(r"\.float\(\)|float32")
_USES_WEIGHTS = re.compile(r"linear\(|conv[123]d\(|scaled_dot_product")
_PUTS_IN = re.compile(r"index_add|index_copy|index_put|masked_scatter|scatter_add|scatter_reduce|\.scatter_?\(")
_LOSS = re.compile(r"[lL]oss\(|cross_entropy|loss_fct")
_MULTIPLIES = re.compile(r"matmul|\bb?mm\(|einsum|[\w)\]] *@ *[\w(]|baddbmm|\s@\s")

_PRODUCTS: frozenset[Any] = frozenset(
    {
        *(F.linear, F.bilinear, F.scaled_dot_product_attention, F.conv1d, F.conv2d, F.conv3d, torch.einsum),
        *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.addmm, torch.baddbmm, torch.addbmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot),
        *(Tensor.addmm, Tensor.baddbmm, Tensor.addbmm),
    }
)
"""Operations that want operands of one dtype, and that autocast would give them."""

_LOSSES: frozenset[Any] = frozenset(
    {
        *(F.cross_entropy, F.nll_loss, F.ctc_loss, F.kl_div, F.binary_cross_entropy, F.poisson_nll_loss),
        *(F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
        *(F.gaussian_nll_loss, F.cosine_embedding_loss, F.triplet_margin_loss, F.margin_ranking_loss),
    }
)
"""What the loss modules, which are float32 by default, call: written out in a forward it is no module of the model."""

_PUTS: frozenset[Any] = frozenset(
    {
        *(
            torch.index_add,
            Tensor.index_add,
            Tensor.index_add_,
            torch.index_copy,
            Tensor.index_copy,
            Tensor.index_copy_,
        ),
        *(torch.masked_scatter, Tensor.masked_scatter, Tensor.masked_scatter_),
        *(torch.index_put, Tensor.index_put, Tensor.index_put_, torch.scatter, Tensor.scatter, Tensor.scatter_),
        *(torch.scatter_add, Tensor.scatter_add, Tensor.scatter_add_),
        *(torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_),
    }
)
"""Operations whose last tensor must have the dtype of the first."""


class Operands(TorchFunctionMode):
    """Mends the operations of one module's own code.

    Args:
        low: the compute dtype around.
        casts: also bring products to it: there is no autocast that does.
    """

    def __init__(self, low: torch.dtype, casts: bool) -> None:
        super().__init__()
        self.low = low
        self.casts = casts

    def again(self) -> Operands:
        """The same, for a recomputation."""
        return Operands(self.low, self.casts)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.casts and func in _PRODUCTS:
            # What is given as `out` is to be written into, not cast.
            out = kwargs.get("out")
            rest = {key: value for key, value in kwargs.items() if key != "out"}
            dtypes = {t.dtype for t in tensors_in((args, kwargs)) if t.dtype in MIXABLE}
            if len(dtypes) > 1:
                args, rest = cast_tree((args, rest), self.low)
                result = func(*args, **rest)
                return result if out is None else fill(out, result)
        elif self.casts and func in _LOSSES:
            args, kwargs = cast_tree((args, kwargs), torch.float32)
        elif func in _PUTS:
            target = args[0] if args else kwargs.get("input")
            if isinstance(target, Tensor) and target.dtype in MIXABLE:
                args = *args[:1], *cast_tree(args[1:], target.dtype)
                kwargs = {key: t if key == "out" else cast_tree(t, target.dtype) for key, t in kwargs.items()}
        return func(*args, **kwargs)


def mixes(module: nn.Module, by_module: bool) -> bool:
    """Say whether a module's own code may give torch operands that it refuses.

    Args:
        module: any module of a model that computes in low precision.
        by_module: under module casting.
    """
    if is_torch_own(module):
        return False
    owner = next(kind for kind in type(module).__mro__ if "forward" in kind.__dict__)
    kinds: set[Any] = {type(module), owner}
    source = "".join(source_of(kind) for kind in kinds)
    if _PUTS_IN.search(source):
        return True
    if not by_module:
        return False
    floats = any(b is not None and b.dtype is torch.float32 for b in module._buffers.values())
    if floats or (_UPCASTS.search(source) and _USES_WEIGHTS.search(source)):
        return True
    # In a product of activations, one may have met a float32 mask.
    return bool(_MULTIPLIES.search(source) or _LOSS.search(source))


def mended(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module that `mixes` is true of."""
    scope = thread.scope
    region = None if scope is None else scope.region
    if scope is None or region is None or region.low is None:
        return forward.original(*args, **kwargs)
    mode = scope.mending = Operands(region.low, region.by_module)
    try:
        with mode:
            return forward.original(*args, **kwargs)
    finally:
        scope.mending = None


def apart(forward: Forward, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Enter a module below one that runs under the mode, without it."""
    mode, scope.mending = scope.mending, None
    try:
        # Only the innermost mode can be set aside: around another one (a device's, an island's) ours is kept.
        if torch._C._get_function_stack_at(torch._C._len_torch_function_stack() - 1) is not mode:
            return forward._enter(scope, args, kwargs)
        torch._C._pop_torch_function_stack()
        try:
            return forward._enter(scope, args, kwargs)
        finally:
            torch._C._push_on_torch_function_stack(mode)
    finally:
        scope.mending = mode
