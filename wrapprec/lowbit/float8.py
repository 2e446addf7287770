"""Runs a Linear layer in fp8, by torchao's float8 training; the module and its float32 weights stay what they are."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from wrapprec import levels
from wrapprec.capture import is_recording
from wrapprec.dtypes import MIXABLE
from wrapprec.island import is_island_open
from wrapprec.lowbit.packages import torchao

if TYPE_CHECKING:
    from wrapprec.forward import Forward

_ROWS = 16
"""Kernels take operands whose inner size is a multiple of this; in the weight's gradient that is the number of rows."""


@dataclass(frozen=True)
class Kernel:
    """What torchao needs to know for one product.

    Args:
        function: its autograd Function.
        settings: its LinearMMConfig, for the products themselves.
        config: its Float8LinearConfig, for the casts.
    """

    function: Any
    settings: Any
    config: Any


@dataclass(frozen=True)
class Kernels:
    """How the layers of one recipe are multiplied, and what runs their forwards.

    Args:
        whole: for a number of rows that kernels take.
        padded: for the others: operands are filled up with zeros, which is exact.
    """

    whole: Kernel
    padded: Kernel

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward of a Linear layer; see `native.Runner`."""
        return run_float8(forward, self, args, kwargs)


@functools.lru_cache
def kernels(recipe: str, emulates: bool) -> Kernels:
    """Fetch torchao's products.

    Args:
        recipe: one of `recipe.RECIPES`.
        emulates: raise the fp8 numbers to float32, in which their products are exact, instead of multiplying them.

    Returns:
        The kernels; they pickle and copy.

    Raises:
        PolicyError: torchao is missing.
    """
    float8 = torchao("float8.float8_linear", "layers in fp8")
    config = float8.Float8LinearConfig.from_recipe_name(recipe)

    def kernel(pads: bool) -> Kernel:
        mine = replace(config, emulate=emulates, pad_inner_dim=pads)
        with torch.device("meta"):
            settings = float8.Float8Linear(_ROWS, _ROWS, bias=False, config=mine).linear_mm_config
        return Kernel(float8.matmul_with_hp_or_float8_args, settings, mine)

    whole = kernel(pads=False)
    return Kernels(whole, whole if emulates else kernel(pads=True))


class Product(Function):
    """torchao's product; gradients that are differentiated again, or come in batches, are computed in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel: Kernel) -> Any:
        """A product of x (..., columns) and weight (columns, rows)."""
        ctx.kernel = kernel
        return kernel.function.forward(ctx, x, weight, kernel.settings, kernel.config)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of both operands."""
        with torch.autocast(grad.device.type, enabled=False):
            if not torch.is_grad_enabled() and not levels.batches_gradients():
                of_x, of_weight, *_ = ctx.kernel.function.backward(ctx, grad)
                return of_x, of_weight, None
            x, weight = ctx.saved_tensors
            flat = grad.reshape(-1, grad.shape[-1])
            of_weight = x.reshape(-1, x.shape[-1]).t() @ flat
            return grad @ weight.t().to(grad.dtype), of_weight.to(weight.dtype), None


def run_float8(forward: Forward, kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the forward of a Linear layer in fp8, or as it is where that cannot be."""
    x: Any = args[0] if args else kwargs.get("input")
    assert forward.region is not None
    if not _can(forward, x):
        # Spelled out: dynamo of torch 2.9 does not follow a bound method made by hand.
        if forward.replaced is None:
            return type(forward.module).forward(forward.module, *args, **kwargs)
        return forward.replaced(*args, **kwargs)
    module: Any = forward.module
    low = forward.region.low
    rows = x.numel() // x.shape[-1]
    kernel = kernels.padded if rows % _ROWS else kernels.whole
    with torch.autocast(x.device.type, enabled=False):
        operands = x.to(low), module.weight.t()
        if torch.compiler.is_compiling():
            # dynamo takes torchao's own Function into the graph as it is; nothing differentiates compiled gradients.
            out = kernel.function.apply(*operands, kernel.settings, kernel.config)
        elif torch.is_inference_mode_enabled():
            # There `reshape` would come to torchao's tensors as it is, and they know it with one scale a tensor only.
            with torch.inference_mode(False), torch.no_grad():
                out = Product.apply(*operands, kernel)
        else:
            out = Product.apply(*operands, kernel)
        return out if module.bias is None else out + module.bias.to(out.dtype)


def _can(forward: Forward, x: Any) -> bool:
    """Whether fp8 is what the code around wants, and torchao has a rule for it."""
    region = forward.region
    if not isinstance(x, Tensor) or region is None or x.dtype not in MIXABLE or x.layout is not torch.strided:
        return False
    if region.autocasts:
        # Off in the user's own `autocast(enabled=False)`, and in `wrapprec.float32()`.
        kind = x.device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) is not region.low:
            return False
    if torch.compiler.is_compiling():
        if torch.compiler._is_exporting_flag:
            return False
    elif is_recording() or levels.any_running() or (not region.autocasts and is_island_open()):
        return False
    # No rows have no largest element; rows of another length are torch's error.
    return x.numel() > 0 and x.dim() > 0 and x.shape[-1] == forward.module.in_features
