"""Converts a model's parameters and buffers in place to the dtypes of its plan, and back: always the same objects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wrapprec.computed import computed_by_hooks
from wrapprec.defaults import keeps_weights, within_parametrisations
from wrapprec.dtypes import LOW, REAL, name
from wrapprec.errors import PolicyError, WrapprecWarning, message, module_label
from wrapprec.forward import Forward
from wrapprec.lent import originals
from wrapprec.lowbit.keep import Kept, follow_loading, forget_loading
from wrapprec.lowbit.managers import check_managers, check_rounded, reducers_of
from wrapprec.lowbit.words import split
from wrapprec.plan import Plan
from wrapprec.standin import forward_of
from wrapprec.state import Shared
from wrapprec.undo import UndoStack

_Found = tuple[str, Tensor, torch.dtype]
"""A tensor to convert: its qualified name, itself, and the dtype it is to have."""

_Place = tuple[str, nn.Module, str, Tensor]
"""Where a converted tensor was: its qualified name there, the module, the name within it, and the tensor."""


def convert(model: nn.Module, shared: Shared, undo: UndoStack) -> None:
    """Give the parameters and buffers of every module that has no Forward yet the dtype of its placement.

    A tied parameter gets the widest of the dtypes that are wanted. What narrows leaves the buffers that are not saved
    with the model as they are: tables that code has computed (rotary frequencies), to which it is going to multiply.

    Args:
        model: the root.
        shared: its state; `shared.converted` takes the old dtypes, and under `kahan` the remainders.
        undo: takes the way back.

    Raises:
        PolicyError: a lazy parameter has no dtype yet, FSDP manages the parameters, or torch cannot keep gradients in
            another dtype than the parameters.
        WrapprecError: a DistributedDataParallel was built around the parameters before.
    """
    plan = shared.plan
    if not _stores(plan):
        return
    if shared.converted is None:
        shared.converted = Kept(plan.rounding)
        if plan.rounding == "kahan":
            follow_loading(model, undo)
    kept = shared.converted
    params = list(_wanted(model, plan, False))
    changing = [found for found in params if found[1].dtype is not found[2]]
    check_managers(model, changing)
    check_rounded(params, plan.rounding)
    changing += [found for found in _wanted(model, plan, True) if found[1].dtype is not found[2]]
    places = list(_places(model, {id(tensor) for _, tensor, _ in changing}))
    graded: list[tuple[Tensor, torch.dtype | None]] = []
    undo.push(lambda: _set_grad_dtypes(graded))
    undo.push(lambda: restore(places, kept))
    for fqn, _, _ in params:
        kept.rests.pop(fqn, None)  # of a module that stood in this place before
    dtypes = {id(tensor): (tensor.dtype, dtype) for _, tensor, dtype in changing}
    kept.dtypes.update({fqn: dtypes[id(tensor)] for fqn, _, _, tensor in places})
    for fqn, tensor, dtype in changing:
        low = tensor.detach().to(dtype)
        if kept.mode == "kahan" and tensor.requires_grad and tensor.dtype not in LOW and dtype in LOW:
            low, kept.rests[fqn] = split(tensor.detach().to(torch.float32), dtype)
        _set(tensor, low)
    trained = [(fqn, param) for fqn, param, dtype in params if dtype in LOW and param.requires_grad]
    wanted: Any = plan.policy.grad_dtype
    if wanted is None and plan.loss_scale is not None and hasattr(Tensor, "grad_dtype"):
        wanted = torch.float32  # true gradients are smaller than float16 reaches
    for fqn, param in (*trained, *_made_anew(model, kept)):
        if wanted in (None, param.dtype):
            continue
        if getattr(param, "grad_dtype", None) is not wanted:
            graded.append((param, _grad_dtype(fqn, param, wanted)))
            _set_grad_dtypes([(param, wanted)])
        kept.grads[fqn] = wanted
    if changing:
        _flatten(model)
    if trained:
        _warn_of_nearest(kept, trained[0][1].dtype)


def _stores(plan: Plan) -> bool:
    """Whether any module keeps its parameters in another dtype than float32."""
    kinds = {placement.precision.param_dtype for placement in plan.placements}
    return bool(kinds & (REAL - {torch.float32}))


def _wanted(model: nn.Module, plan: Plan, buffers: bool) -> Iterator[_Found]:
    """The floating tensors of the modules that were not placed before, each once, and the dtypes they are to have."""
    everywhere = plan.policy.param_dtype in REAL - {torch.float32}
    parametrised = within_parametrisations(model)
    found: dict[int, _Found] = {}
    pinned: set[int] = set()
    for fqn, module in model.named_modules():
        if isinstance(forward_of(module), Forward):
            continue
        dtype = plan.placement(fqn).precision.param_dtype
        made_of = computed_by_hooks(module)
        for key, tensor in (module._buffers if buffers else originals(module)).items():
            if tensor is None:
                continue
            if not isinstance(dtype, torch.dtype) or (dtype is torch.float32 and not everywhere):
                pinned.add(id(tensor))
                continue
            if is_lazy(tensor):
                raise PolicyError(
                    message(
                        f"parameters to store in {name(dtype)}",
                        f"a lazy parameter {key!r}, which has no shape yet",
                        where=module_label(fqn, module),
                        remedy="run one forward before wrap",
                    )
                )
            unsaved = buffers and key in module._non_persistent_buffers_set
            if tensor.dtype not in REAL or tensor.is_meta or (unsaved and dtype in LOW):
                continue
            wide = dtype in LOW and (key in made_of or keeps_weights(module, parametrised))
            wanted = torch.promote_types(torch.float32, tensor.dtype) if wide else dtype
            first, _, other = found.get(id(tensor), (f"{fqn}.{key}".lstrip("."), tensor, wanted))
            found[id(tensor)] = first, tensor, torch.promote_types(other, wanted)
    yield from (one for key, one in found.items() if key not in pinned)


def _places(model: nn.Module, tensors: set[int]) -> Iterator[_Place]:
    """Every place of these tensors, several of one that is tied: what is moved may not be so any more."""
    for fqn, module in model.named_modules():
        for key, tensor in (*originals(module).items(), *module._buffers.items()):
            if id(tensor) in tensors:
                yield f"{fqn}.{key}".lstrip("."), module, key, tensor


def _made_anew(model: nn.Module, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """The trained weights of the modules that were placed before: a move may have made new Parameters of them."""
    for fqn, module in model.named_modules():
        if isinstance(forward_of(module), Forward):
            for key, param in originals(module).items():
                path = f"{fqn}.{key}".lstrip(".")
                if param is not None and param.requires_grad and param.dtype in LOW and path in kept.dtypes:
                    yield path, param


def _held(places: list[_Place]) -> Iterator[tuple[str, Tensor]]:
    """The converted tensors, and what has taken their places since.

    `Module.to` makes new Parameters on devices whose tensors are of another kind, and new buffers always.
    """
    for fqn, module, key, tensor in places:
        yield fqn, tensor
        now = originals(module).get(key)
        now = module._buffers.get(key) if now is None else now
        if now is not None and now is not tensor:
            yield fqn, now


def _set(tensor: Any, data: Tensor) -> None:
    """Exchange what a tensor holds, and its gradient's dtype with it."""
    grad, tensor.grad = tensor.grad, None
    # Once it was set, torch's `grad_dtype` does not follow the dtype by itself any more.
    follows = getattr(tensor, "grad_dtype", None) is tensor.dtype
    tensor.data = data
    if follows and tensor.grad_dtype is not data.dtype:
        tensor.grad_dtype = data.dtype
    if grad is not None:
        tensor.grad = grad.to(getattr(tensor, "grad_dtype", None) or data.dtype)


def _grad_dtype(fqn: str, param: Any, wanted: Any) -> torch.dtype | None:
    """The dtype of the gradient, where torch lets it differ from the parameter's; None where it does not differ."""
    if not hasattr(param, "grad_dtype"):
        raise PolicyError(
            message(
                "a torch that keeps gradients in another dtype than the parameters (2.10 or later)",
                f"torch {torch.__version__} and gradients in {name(wanted)}",
                where=repr(fqn),
                remedy="leave grads= out: they are then accumulated in the parameters' dtype",
            )
        )
    dtype: torch.dtype = param.grad_dtype
    return None if dtype is param.dtype else dtype


def _set_grad_dtypes(graded: list[tuple[Any, Any]]) -> None:
    """Have gradients in these dtypes; None is that of the parameter."""
    for param, dtype in graded:
        grad, param.grad = param.grad, None
        param.grad_dtype = dtype or param.dtype
        param.grad = None if grad is None else grad.to(param.grad_dtype)


def restore(places: list[_Place], kept: Kept) -> None:
    """Give tensors back the dtypes they had; under `kahan` with the remainders, so that nothing is lost.

    Args:
        places: at `convert`; tensors whose dtype somebody has changed since are left alone.
        kept: what `convert` wrote.
    """
    tensors = list(_held(places))
    for fqn, tensor in tensors:
        before, now = kept.dtypes[fqn]
        if tensor.dtype is now and not tensor.is_meta:
            whole = kept.widen(fqn, tensor) if now in LOW and before not in LOW else tensor.detach()
            _set(tensor, whole.to(before))
    reducers = reducers_of({id(tensor) for _, tensor in tensors if tensor.requires_grad})
    if reducers:
        warnings.warn(
            message(
                "unwrap after the DistributedDataParallel around the model is gone",
                "one that is alive, and that does not reduce gradients of parameters whose dtype has changed",
                remedy="build DistributedDataParallel(model) anew",
            ),
            WrapprecWarning,
            stacklevel=4,
        )


def restore_copy(model: nn.Module, kept: Kept) -> None:
    """Give the tensors of a copied, or loaded, wrapped model back the dtypes that the original's had."""
    named = (
        (f"{fqn}.{key}".lstrip("."), module, key, tensor)
        for fqn, module in model.named_modules()
        for key, tensor in (*originals(module).items(), *module._buffers.items())
    )
    restore([place for place in named if place[3] is not None and place[0] in kept.dtypes], kept)
    forget_loading(model)
    _flatten(model)


def _flatten(model: nn.Module) -> None:
    """Let recurrent networks lay their weights out in one piece again, where their kernels want that."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def _warn_of_nearest(kept: Kept, dtype: torch.dtype) -> None:
    if kept.mode in ("kahan", "stochastic"):
        return
    bits = 8 if dtype is torch.bfloat16 else 11
    text = message(
        "a rounding that keeps small updates of low precision weights",
        f"rounding={kept.mode or 'none'}: updates of {name(dtype)} weights that are smaller than 2**-{bits + 1} of"
        " the weight are lost",
        remedy='use rounding="kahan" or "stochastic"',
    )
    warnings.warn(text, WrapprecWarning, stacklevel=5)
