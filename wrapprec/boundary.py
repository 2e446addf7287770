"""The autograd Functions at the border of a scope: lend weights, enter, leave.

Inside a scope every gradient is S times what it is outside. A value may cross the border in forward (a weight, an
input, an output) or in backward (their gradients), and with ``create_graph=True`` the crossings of backward are
themselves differentiated. One rule gives every case: *a gradient with respect to anything inside is S times the
true one*. So a crossing that multiplies by k on its way in has the backward ``k / S`` on the way out, and one that
multiplies by k on its way out has the backward ``k * S`` on the way in:

======================  =========  ===  ==========================
Function                direction  k    its backward
======================  =========  ===  ==========================
`Enter`, `Lend`         in         1    `ScaleDown`, `Return`: 1/S
`Leave`                 out        1    `ScaleUp`: S
`ScaleDown`, `Return`   out        1/S  `Enter`, `Lend`: 1
`ScaleUp`               in         S    `Leave`: 1
======================  =========  ===  ==========================

Every Function returns `Tensor.detach`: storage and version counter are shared, but it is not a view to autograd, so
that later in-place operations are allowed and those that spoil a saved tensor are still noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from wrapprec.border import Border, running
from wrapprec.dtypes import LOW
from wrapprec.flags import check_and_scale_, real, scalar, values_of
from wrapprec.levels import physically
from wrapprec.sharded import is_distributed_tensor, local

if TYPE_CHECKING:
    from wrapprec.bucket import Bucket

Dtypes = tuple[torch.dtype | None, ...]


class Crossing(Function):
    """What they have in common: those of one tensor keep its border; and a type that torch leaves out."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Do as `Function.apply`, but do not bind the arguments by `inspect`: a third of a small step (torch 2.13)."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]  # in C

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.border, ctx.crossing = inputs[1], cls

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        # Every crossing is linear: a tangent crosses as its value does, and so do gradients of tangents.
        return None if tangents[0] is None else cls.apply(tangents[0], ctx.border)

    @classmethod
    def vmap(cls, info: Any, dims: tuple[Any, ...], *inputs: Any) -> Any:
        # Elementwise: a batch crosses as one tensor, and overflow anywhere in it is one flag.
        return cls.apply(*inputs), dims[0]


def _tangents(apply: Callable[..., Any], given: Sequence[Any], like: Sequence[Tensor]) -> tuple[Any, ...]:
    """Let the tangents that there are cross; autograd wants all or none, so the others are zero.

    Args:
        apply: gets the positions of those that there are, and returns what they became.
        given: tangents, or None.
        like: tensors of the shapes and dtypes of what they become.
    """
    wanted = [i for i, tangent in enumerate(given) if tangent is not None]
    made = dict(zip(wanted, apply(wanted), strict=True)) if wanted else {}
    return tuple(made[i] if i in made else torch.zeros_like(one) if made else None for i, one in enumerate(like))


class Enter(Crossing):
    """Identity on the way in; the gradient is divided by S on the way out."""

    @staticmethod
    def forward(tensor: Tensor, border: Border) -> Tensor:
        return physically(Tensor.detach, tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.border.leave_backward("an input")
        return ScaleDown.apply(grad, ctx.border), None


class Inward:
    """A hook on a leaf that was made inside: its gradient is divided by S before it is accumulated.

    Args:
        border: of the scope in which the leaf was made.
    """

    def __init__(self, border: Border) -> None:
        self.border = border

    def __call__(self, grad: Tensor) -> Tensor:
        self.border.leave_backward("a tensor that a hook made a leaf")
        true: Tensor = ScaleDown.apply(grad, self.border)
        return true


class ScaleDown(Crossing):
    """An input's gradient on its way out."""

    @staticmethod
    def forward(grad: Tensor, border: Border) -> Tensor:
        def scale(grad: Tensor) -> Tensor:
            # The product is taken in float32, where 1/S and an overflow can be told apart.
            true = grad.to(torch.float32, copy=True) if grad.dtype in LOW else grad.clone()
            for flag in check_and_scale_([real(values_of(true))], border.scale.reciprocal()):
                seen = border.scaler.seen
                torch.maximum(seen, scalar(flag, seen), out=seen)
            return true.to(grad.dtype)

        return physically(scale, grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.border.enter_backward()
        return Enter.apply(grad, ctx.border), None


class Leave(Crossing):
    """Identity on the way out; the gradient is multiplied by S on the way in."""

    @staticmethod
    def forward(tensor: Tensor, border: Border) -> Tensor:
        return physically(Tensor.detach, tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.border.enter_backward()
        return ScaleUp.apply(grad, ctx.border), None


class ScaleUp(Crossing):
    """An output's gradient on its way in."""

    @staticmethod
    def forward(grad: Tensor, border: Border) -> Tensor:
        return grad * scalar(border.scale, grad).to(grad.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.border.leave_backward("an output's gradient")
        return Leave.apply(grad, ctx.border), None


class Recompute(Crossing):
    """Identity both ways on the outputs of a recomputed block: it tells the nested backward which S is in force."""

    @staticmethod
    def forward(tensor: Tensor, border: Border) -> Tensor:
        return physically(Tensor.detach, tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.border.enter_backward()
        return Recompute.apply(grad, ctx.border), None


class Lend(Crossing):
    """Weights on their way in: cast, or the same storage in the same dtype."""

    @staticmethod
    def forward(border: Border | None, bucket: Bucket, dtypes: Dtypes, *tensors: Tensor) -> tuple[Tensor, ...]:
        return physically(lambda *whole: Lend._cast(bucket, dtypes, whole), *tensors)

    @staticmethod
    def _cast(bucket: Bucket, dtypes: Dtypes, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if bucket.multi_tensor and not any(map(is_distributed_tensor, tensors)):
            cast = [(t, d) for t, d in zip(tensors, dtypes, strict=True) if d not in (None, t.dtype)]
            low = [torch.empty_like(t, dtype=d) for t, d in cast]
            if low:
                torch._foreach_copy_(low, [t for t, _ in cast])
            made = iter(low)
            return tuple(
                t.detach() if d in (None, t.dtype) else next(made) for t, d in zip(tensors, dtypes, strict=True)
            )
        return tuple(t.detach() if d is None else t.detach().to(d) for t, d in zip(tensors, dtypes, strict=True))

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        # Plain attributes: a saved tensor would have to be saved again, in the same order, by a recomputation.
        ctx.border, ctx.bucket, ctx.low, *ctx.tensors = inputs
        ctx.crossing = cls

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        def cross(wanted: list[int]) -> Any:
            dtypes = tuple(ctx.low[i] for i in wanted)
            return cls.apply(ctx.border, ctx.bucket, dtypes, *(tangents[3 + i] for i in wanted))

        lent = [t if d is None else torch.empty_like(t, dtype=d) for t, d in zip(ctx.tensors, ctx.low, strict=True)]
        return _tangents(cross, tangents[3:], lent)

    @classmethod
    def vmap(cls, info: Any, dims: tuple[Any, ...], *inputs: Any) -> Any:
        return cls.apply(*inputs), dims[3:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.border is not None:
            ctx.border.leave_backward("a weight")
        wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[3 + i]]
        true: list[Tensor | None] = [None] * len(grads)
        if wanted:
            tensors = [ctx.tensors[i] for i in wanted]
            low = tuple(ctx.low[i] for i in wanted)
            returned = Return.apply(ctx.border, ctx.bucket, low, tensors, *(grads[i] for i in wanted))
            for i, grad in zip(wanted, returned, strict=True):
                true[i] = ctx.bucket.deliver(ctx.tensors[i], grad)
        return None, None, None, *true


class Return(Crossing):
    """The gradients of lent weights on their way out: cast to the weight's dtype, times 1/S, overflow recorded."""

    @staticmethod
    def forward(
        border: Border | None, bucket: Bucket, low: Dtypes, tensors: list[Tensor], *grads: Tensor
    ) -> tuple[Tensor, ...]:
        return physically(lambda *whole: Return._cast(border, bucket, tensors, whole), *grads)

    @staticmethod
    def _cast(
        border: Border | None, bucket: Bucket, tensors: list[Tensor], grads: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        dense = [i for i, grad in enumerate(grads) if grad.layout is torch.strided]
        true: list[Tensor] = list(grads)
        into = [bucket.grad_dtype(tensor) for tensor in tensors]
        if bucket.multi_tensor and dense and not any(map(is_distributed_tensor, grads)):
            fresh = [torch.empty_like(grads[i], dtype=into[i]) for i in dense]
            torch._foreach_copy_(fresh, [grads[i] for i in dense])
            for i, grad in zip(dense, fresh, strict=True):
                true[i] = grad
        else:
            for i in dense:
                true[i] = grads[i].to(into[i], copy=True)
        checked = [real(local(true[i])) for i in dense]
        for i, grad in enumerate(grads):
            if grad.layout is not torch.strided:
                values = grad._values().to(into[i], copy=True)
                true[i] = torch.sparse_coo_tensor(
                    grad._indices(), values, grad.shape, is_coalesced=grad.is_coalesced(), check_invariants=False
                )
                checked.append(real(values))
        if border is not None:
            bucket.record(check_and_scale_(checked, border.inverse), tensors, border.scaler.seen, running)
        return tuple(true)

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.border, ctx.bucket, ctx.low, ctx.weights = inputs[:4]
        ctx.set_materialize_grads(False)
        ctx.crossing = cls

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        def cross(wanted: list[int]) -> Any:
            low, weights = tuple(ctx.low[i] for i in wanted), [ctx.weights[i] for i in wanted]
            return cls.apply(ctx.border, ctx.bucket, low, weights, *(tangents[4 + i] for i in wanted))

        return _tangents(cross, tangents[4:], ctx.weights)

    @classmethod
    def vmap(cls, info: Any, dims: tuple[Any, ...], *inputs: Any) -> Any:
        return cls.apply(*inputs), dims[4:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.border is not None:
            ctx.border.enter_backward()
        wanted = [i for i, grad in enumerate(grads) if grad is not None]
        low: list[Tensor | None] = [None] * len(grads)
        if wanted:
            dtypes = tuple(ctx.low[i] for i in wanted)
            lent = Lend.apply(ctx.border, ctx.bucket, dtypes, *(grads[i] for i in wanted))
            for i, grad in zip(wanted, lent, strict=True):
                low[i] = grad
        return None, None, None, None, *low
