"""A wrapped module's forward as torch.compile traces it: the same semantics, without what dynamo cannot follow.

Locks, audits, version checks and the bookkeeping per backward stay outside compiled graphs; the borders are plain
Functions of tensors. Double backward through compiled code is not offered by AOTAutograd either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from wrapprec.capture import refuse_scale
from wrapprec.cast import cast_tree, map_tensors
from wrapprec.computed import Computed, computed_by_hooks
from wrapprec.current import thread
from wrapprec.dtypes import MIXABLE
from wrapprec.errors import module_label
from wrapprec.gathered import lend_dtype, refuse_compiled
from wrapprec.lowbit.float8 import Kernels, run_float8
from wrapprec.lowbit.products import Product
from wrapprec.native import narrow_masks

if TYPE_CHECKING:
    from wrapprec.forward import Forward


class _Everything:
    """Contains all."""

    def __contains__(self, item: object) -> bool:
        return True


class TracedScope:
    """A scope that is open while dynamo traces, and while what it could not trace runs.

    Args:
        shared: the wrapped model's state.
        outer: the scope around, of this kind or not.
        region: the precision around.
        total: by how much gradients inside are scaled, all scopes taken together; None where they are not.
    """

    # For a Forward that runs inside without being traced: all is lent, and nothing is to be noted.
    done = _Everything()
    simple: frozenset[Any] = frozenset()
    grad = False
    border = None
    watched = ()
    mending: Any = None

    def __init__(self, shared: Any, outer: Any, region: Any, total: Tensor | None) -> None:
        self.shared = shared
        self.outer = outer
        self.region = region
        self.total = total

    @property
    def computed(self) -> Computed:
        """Casts the weights that hooks compute, for what runs inside without being traced."""
        return Computed(self.shared, None)


class Scale(Function):
    """Identity; the gradient is multiplied by `factor` (S on leaving, 1/S on entering)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor.to(grad.dtype), None


class LendOne(Function):
    """One weight on its way in; its gradient comes back cast, times 1/S, with overflow recorded in place."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, scale: Tensor, found: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.found, ctx.seen, ctx.dtype = found, seen, weight.dtype
        return weight.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (scale,) = ctx.saved_tensors
        true = grad.to(ctx.dtype) * scale.reciprocal()
        bad = 1.0 - torch.isfinite(true).all().to(torch.float32)
        ctx.found.copy_(torch.maximum(ctx.found, bad))
        ctx.seen.copy_(torch.maximum(ctx.seen, bad))
        return true, None, None, None, None


def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`Forward.__call__` under dynamo."""
    scope: Any = thread.scope
    if scope is not None and scope.shared is forward.shared:
        if type(scope) is TracedScope:
            return _with_computed(forward, scope, args, kwargs, None)
        return _part(forward, scope, args, kwargs)
    shared = forward.shared
    scaler = shared.scaler if torch.is_grad_enabled() else None
    if scaler is not None and shared.sharded:
        refuse_compiled(module_label(forward.name, forward.module))
    # Not is_exporting(): dynamo of torch 2.9 takes that for true whatever it traces for.
    if scaler is not None and torch.compiler._is_exporting_flag:
        if not torch.onnx.is_in_onnx_export():
            refuse_scale("torch.export", module_label(forward.name, forward.module))
        scaler = None
    around = _total(scope)
    total = around if scaler is None else scaler.scale if around is None else scaler.scale * around
    opened = TracedScope(shared, scope, None, total)
    thread.scope = opened  # type: ignore[assignment]  # the same interface for what runs inside
    loans: list[tuple[Any, str, Any]] = []
    try:
        _lend(forward, None if scaler is None else total, loans)
        if scaler is not None:
            inverse = scaler.scale.reciprocal()
            args, kwargs = map_tensors(lambda t: _crossed(t, inverse), (args, kwargs))
        out = _with_computed(forward, opened, args, kwargs, None if scaler is None else total)
        if forward.output_dtype is not None:
            out = cast_tree(out, forward.output_dtype)
        if scaler is not None:
            scaler.touched = True
            scale = scaler.scale
            out = map_tensors(lambda t: _crossed(t, scale), out)
        return out
    finally:
        thread.scope = scope
        for weights, name, before in loans:
            weights[name] = before


def _part(forward: Forward, scope: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A compiled part of a model that runs eagerly: its weights are lent inside the graph, and there is no border."""
    opened = TracedScope(forward.shared, scope, scope.region, _total(scope))
    thread.scope = opened  # type: ignore[assignment]  # the same interface for what runs inside
    loans: list[tuple[Any, str, Any]] = []
    try:
        scale = opened.total if scope.border is not None and torch.is_grad_enabled() else None
        if scale is not None and forward.shared.sharded:
            refuse_compiled(module_label(forward.name, forward.module))
        _lend(forward, scale, loans)
        return _with_computed(forward, opened, args, kwargs, scale)
    finally:
        thread.scope = scope
        for weights, name, before in loans:
            weights[name] = before


def _total(scope: Any) -> Any:
    """By how much gradients are scaled inside the innermost of the open scopes that scale."""
    while scope is not None:
        if type(scope) is TracedScope:
            return scope.total
        if scope.border is not None:
            return scope.border.total
        scope = scope.outer
    return None


def _crossed(tensor: Tensor, factor: Tensor) -> Tensor:
    if not tensor.requires_grad or tensor.dtype not in MIXABLE:
        return tensor
    crossed: Tensor = Scale.apply(tensor, factor)
    return crossed


def _lend(forward: Forward, scale: Any, loans: list[tuple[Any, str, Any]]) -> None:
    memo: dict[tuple[int, torch.dtype], Tensor] = {}
    scaler: Any = forward.shared.scaler
    for below in forward.tree():
        # A lent weight is no Parameter, whatever torch's annotation says.
        weights: dict[str, Any] = below.module._parameters
        if type(weights) is not dict:
            # What is called here is compiled, and no module of it: the scope around has lent the weights.
            continue
        if below.module._forward_pre_hooks:
            below.computed = computed_by_hooks(below.module)
        for name in list(weights):
            param = weights[name]
            if param is None:
                continue
            low = None if name in below.computed else below.lend_dtype
            if below.managed and name in below.managed:
                if param is below.managed[name].shard:
                    continue
                low = lend_dtype(below, param.dtype)
            dtype = low if param.dtype in MIXABLE and low is not None else param.dtype
            border = scale is not None and param.requires_grad
            if dtype == param.dtype and not border:
                continue
            key = id(param), dtype
            if key not in memo:
                if border:
                    bucket = below.buckets[name]
                    bucket.pending = True
                    memo[key] = LendOne.apply(param, dtype, scale, bucket.found, scaler.seen)
                else:
                    memo[key] = param.to(dtype)
            loans.append((weights, name, param))
            weights[name] = memo[key]


def _with_computed(forward: Forward, scope: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scale: Any) -> Any:
    computed = _swap_computed(forward, scale)
    try:
        return _enter(forward, scope, args, kwargs)
    finally:
        _swap_back(forward, computed)


def _swap_computed(forward: Forward, scale: Any) -> list[tuple[str, Tensor]]:
    """Lend the weights that hooks have computed outside, where there is a scale, or cast those computed inside."""
    swapped: list[tuple[str, Tensor]] = []
    scaler: Any = forward.shared.scaler
    for name, key in {name: key for key, name in forward.computed.items()}.items():
        weight: Any = getattr(forward.module, name)
        dtype = forward.lend_dtype if weight.dtype in MIXABLE and forward.lend_dtype is not None else weight.dtype
        if scale is not None and weight.requires_grad:
            bucket = forward.buckets[key]
            bucket.pending = True
            made: Tensor = LendOne.apply(weight, dtype, scale, bucket.found, scaler.seen)
        elif weight.dtype is not dtype:
            made = weight.to(dtype)
        else:
            continue
        swapped.append((name, weight))
        setattr(forward.module, name, made)
    return swapped


def _swap_back(forward: Forward, swapped: list[tuple[str, Tensor]]) -> None:
    for name, weight in swapped:
        setattr(forward.module, name, weight)


def _enter(forward: Forward, scope: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    around = scope.region
    region = forward.region
    if region is None:
        # Other runtimes have no kernels that take the mix. Strict export (torch 2.13) takes the activations within
        # autocast for float32 there, and asserts it.
        exports = torch.compiler._is_exporting_flag and not torch.compiler.is_dynamo_compiling()
        region = forward.wide if exports else around
    crosses = region is not around
    if region is not None and (
        (region.casts and (crosses or (region.by_module and forward.module._parameters)))
        or (region.narrows and region.meets(around))
    ):
        args, kwargs = region.cast_inputs((args, kwargs))
    if not crosses or region is None:
        return _run(forward, args, kwargs)
    scope.region = region
    try:
        with region.context(traced=True):
            out = _run(forward, args, kwargs)
    finally:
        scope.region = around
    return out if around is None else region.give_back(out, around)


def _run(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if type(forward.runner) is Kernels:
        return run_float8(forward, forward.runner, args, kwargs)
    if isinstance(forward.runner, Product):
        return forward.runner(forward, args, kwargs)
    if isinstance(forward.module, nn.MultiheadAttention) and forward.runner is not None:
        args = narrow_masks(forward, args, kwargs)
    # Spelled out: dynamo of torch 2.9 does not follow a bound method made by hand.
    if forward.replaced is None:
        return type(forward.module).forward(forward.module, *args, **kwargs)
    return forward.replaced(*args, **kwargs)
