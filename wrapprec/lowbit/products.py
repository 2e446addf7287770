"""How a module with a quantised weight computes: what `fourbits` and `eightbits` have in common.

bitsandbytes' own modules are not called: in eval on a CPU they repack their weight in place, in a form that loses
accuracy and, from then on, gradients without a word; they cast their bias in place; and they do not know autocast.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wrapprec.dtypes import MIXABLE, name
from wrapprec.errors import CaptureError, DtypeMismatchError, WrapprecWarning, message, module_label
from wrapprec.lowbit.packages import bitsandbytes

if TYPE_CHECKING:
    from wrapprec.forward import Forward


_loaded: dict[str, Any] = {}
"""bitsandbytes, once it was imported: dynamo can trace a look into a dict, and no import."""


def library(form: str) -> Any:
    """The package bitsandbytes.

    Args:
        form: the weight format that needs it.

    Raises:
        PolicyError: it is not installed.
    """
    if "bitsandbytes" not in _loaded:
        _loaded["bitsandbytes"] = bitsandbytes(f"{form} weights")
    return _loaded["bitsandbytes"]


class Product(ABC):
    """Runs a module in the place of its forward."""

    @abstractmethod
    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output."""


@dataclass(eq=False)
class Quantised(Product):
    """Runs a module whose weight is quantised, and knows how to give the weight back.

    Args:
        form: the weight format.
        parameter: the module's own parameter; from `released` on it has no elements.
        kind: the class the module had.
        released: the parameter's storage was given up, and only the quantised weight is left.
        silent: nobody said that the weight would not train, and nobody was told that it does not.
        transposed: the parameter has inputs in its rows (Hugging Face's Conv1D); it is stored as a linear layer's.
    """

    form: str
    parameter: nn.Parameter
    kind: Any
    released: bool = False
    silent: bool = False
    transposed: bool = False

    def store(self, parameter: Tensor) -> Any:
        """Quantise numbers that lie as in the parameter: `pack`, in the layout of a linear layer."""
        return self.pack(parameter.t() if self.transposed else parameter)

    def restore(self, weight: Any) -> Tensor:
        """What the numbers of a packed weight mean, lying as in the parameter."""
        return self.unpack(weight).t().contiguous() if self.transposed else self.unpack(weight)

    def shape(self, weight: Any) -> tuple[int, int]:
        """The rows and columns of a packed weight, unpacked: outputs and inputs of a linear layer."""
        rows, columns = (weight if weight.dtype is torch.int8 else weight.quant_state).shape
        return int(rows), int(columns)

    @abstractmethod
    def pack(self, weight: Tensor) -> Any:
        """Quantise a weight.

        Args:
            weight: in float32, float16 or bfloat16, ``(outputs, inputs)``.

        Returns:
            A parameter of bitsandbytes with what it needs to be read, which requires no gradient.
        """

    @abstractmethod
    def unpack(self, weight: Any) -> Tensor:
        """What the numbers of a packed weight mean, in the dtype it was quantised from."""

    @abstractmethod
    def compute(self, forward: Forward, weight: Any, x: Tensor) -> Tensor:
        """The module's output."""

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = forward.module
        if self.silent and module.training and torch.is_grad_enabled():
            self._tell(forward)
        weight = module._parameters["weight"]
        if weight is None or weight.is_floating_point():  # the user put another one in its place
            return self.kind.forward(module, *args, **kwargs)
        if not hasattr(weight, "SCB" if weight.dtype is torch.int8 else "quant_state"):
            raise _stands_in(forward)
        x: Tensor = args[0] if args else kwargs["x" if self.transposed else "input"]
        return self.compute(forward, weight, x)

    def _tell(self, forward: Forward) -> None:
        self.silent = False
        if "quantised" in forward.shared.warned:
            return
        forward.shared.warned.add("quantised")
        text = message(
            "weights that are frozen on purpose where they are quantised",
            f"a forward that trains, with a weight that required grad when it was stored as {self.form}: it gets no"
            " gradient",
            where=module_label(forward.name, forward.module),
            remedy="call model.requires_grad_(False) before wrap and train adapters beside it, or use a bf16 policy",
        )
        warnings.warn(text, WrapprecWarning, stacklevel=2)


def _stands_in(forward: Forward) -> CaptureError:
    return CaptureError(
        message(
            "a quantised weight with its scales",
            "a tensor that stands in for one and has none: torch.export, torch.func.functional_call or nn.DataParallel"
            " put it there",
            where=module_label(forward.name, forward.module),
            remedy="call wrapprec.unwrap(model) before, on a copy.deepcopy where the model is still needed",
        )
    )


def operands(forward: Forward, shape: tuple[int, int], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The input and the bias in the dtype in which torch would multiply them.

    Args:
        forward: of the module.
        shape: outputs and inputs.
        x: the input.

    Returns:
        Both, the bias or None.

    Raises:
        DtypeMismatchError: the input is not floating, or in float64.
    """
    module: Any = forward.module
    if x.dtype not in MIXABLE:
        raise DtypeMismatchError(
            message(
                "an input in float32, bfloat16 or float16 to a layer with quantised weights",
                f"an input in {name(x.dtype)}"
                + ("; code around it may cast activations to `weight.dtype`" if not x.is_floating_point() else ""),
                where=module_label(forward.name, module),
                remedy=f'cast to the dtype of the activations, or add rules=[Rule("{forward.name}", "bf16-mixed")]',
            )
        )
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        # bitsandbytes would transpose the weight where that fits; torch says what is wrong.
        functional.linear(x.to("meta"), torch.empty(shape, dtype=x.dtype, device="meta"))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = module.bias
    return x, None if bias is None else bias.to(x.dtype)
