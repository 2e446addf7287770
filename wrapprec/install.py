"""Puts a plan into a model: one `Forward` a module, in a transaction, and again when the model has changed."""

from __future__ import annotations

import dataclasses
import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wrapprec import audit
from wrapprec.backends.recording import is_graph
from wrapprec.backends.select import backend_for, other_types
from wrapprec.checks import check_dtype
from wrapprec.defaults import copies_weights, has_wide_statistics, keeps_weights, within_parametrisations
from wrapprec.dtypes import MIXABLE, REAL, is_low, name
from wrapprec.errors import AlreadyWrappedError, PolicyError, WrapprecWarning, message, module_label
from wrapprec.forward import Forward
from wrapprec.fsdp import check_sharding
from wrapprec.gathered import check_not_compiled
from wrapprec.lowbit.convert import convert, restore_copy
from wrapprec.lowbit.float8 import kernels
from wrapprec.lowbit.products import Product
from wrapprec.lowbit.quantised import adopt as adopt_quantised
from wrapprec.lowbit.quantised import quantise, release
from wrapprec.native import runner_for
from wrapprec.operands import mended, mixes
from wrapprec.placement import Activations
from wrapprec.plan import Placement, Plan, resolve
from wrapprec.policy import Precision
from wrapprec.region import Region
from wrapprec.sharded import MARK, managed_below
from wrapprec.standin import forward_of, place_of
from wrapprec.state import Request, Shared
from wrapprec.undo import UndoStack

Regions = dict[tuple[Precision, Activations], Region]

_changing = threading.RLock()
"""Held while a changed model is taken up, so that two threads do not do it at once."""


_said: set[str] = set()
"""Advice that was given in this process: once is enough, the plan repeats it."""

_FLOAT32 = Precision(torch.float32, torch.float32, torch.float32)


def install(
    model: nn.Module,
    request: Request,
    undo: UndoStack,
    siblings: list[Shared],
    optimizers: Iterable[Optimizer] = (),
) -> Shared:
    """Wrap one model.

    Args:
        model: the root.
        request: what the user asked for.
        undo: takes every change; the caller undoes it when anything raises.
        siblings: models wrapped by the same call; a module that they share stays theirs.
        optimizers: those that will step its parameters.

    Returns:
        The model's state.

    Raises:
        AlreadyWrappedError: some module is part of a wrapped model.
        PolicyError: the policy does not fit the model, or is not supported yet.
    """
    _check_unwrapped(model, siblings)
    plan = _resolve(model, request)
    check_sharding(model, plan)
    device = torch.device(plan.device)
    shared = Shared(model, request, plan, backend_for(device), device)
    shared.refresh = refresh
    undo.push(lambda: audit.dismiss(shared.schedule))
    convert(model, shared, undo)
    _place(model, shared, undo, plan)
    quantise(model, plan, undo, optimizers)
    shared.ranks.look_below(model)
    for forward in forward_of(model).tree():
        for key, param in forward.module._parameters.items():
            problem = None if param is None or key in (forward.managed or ()) else check_dtype(forward, key, param)
            if problem is not None and shared.mixed:
                raise PolicyError(problem)
    shared.partition(forward_of(model).tree())
    _hasten(shared, undo)
    for note in plan.notes:
        if note not in _said:
            _said.add(note)
            warnings.warn(note, WrapprecWarning, stacklevel=4)
    return shared


def refresh(forward: Forward) -> None:
    """Take up what changed below a module since it was wrapped: its device, new or replaced submodules.

    Raises:
        PolicyError: the policy does not fit the changed model.
    """
    with _changing:
        _refresh(forward)


def _refresh(forward: Forward) -> None:
    shared = forward.shared
    shared.backend.refuse_recording(
        "a model that has not changed since its last forward",
        "one that has: modules or its device; taking that up reads the device",
        where=module_label(forward.name, forward.module),
        remedy="call it once before, which warming up does anyway",
    )
    root = None if shared.root is None else shared.root()
    # A shallow copy of the whole model has the name of the root, and may have other submodules.
    model = forward.module if root is None or forward.name == "" else root
    if shared.undo is None:
        shared.undo = adopt(model)
    plan = _resolve(model, shared.request)
    device = torch.device(plan.device)
    if device != shared.device:
        shared.device, shared.backend = device, backend_for(device)
        if shared.scaler is not None:
            shared.scaler.to(device)
    if root is None or model is root:
        shared.plan = plan
    convert(model, shared, shared.undo)
    _place(model, shared, shared.undo, plan)
    quantise(model, plan, shared.undo, None)
    release(model)
    shared.start_scaling()
    shared.partition(forward_of(model).tree())
    _hasten(shared, shared.undo)
    shared.schedule.restart()


def _hasten(shared: Shared, undo: UndoStack) -> None:
    """Turn the device's switches for fast float32 products on, once for each type of device the model has been on."""
    fast = any(placement.precision.compute_dtype == "tf32" for placement in shared.plan.placements)
    if fast and shared.backend.switches is not None and shared.backend.name not in shared.hastened:
        undo.push(shared.backend.switches.turn_on())
        shared.hastened.add(shared.backend.name)


def _resolve(model: nn.Module, request: Request) -> Plan:
    options: dict[str, Any] = {} if request.loss_scale is None else {"loss_scale": request.loss_scale}
    plan = resolve(model, request.policy, rules=request.rules, **options)
    for placement in plan.placements:
        precision = placement.precision
        compute = precision.compute_dtype
        doubles = {precision.param_dtype is torch.float64, compute is torch.float64}
        if len(doubles) > 1 or (compute == "fp8" and precision.param_dtype is not torch.float32):
            raise PolicyError(
                message(
                    "float32 parameters under fp8, and float64 for parameters and computation or for neither",
                    f"{plan.policy}, which has {name(precision.param_dtype)} parameters, computing in {name(compute)}",
                    where=f"{placement.name!r} ({placement.module_type})",
                    remedy="use 64-true for float64, and fp8-mixed for fp8",
                )
            )
    return plan


def _check_unwrapped(model: nn.Module, siblings: list[Shared]) -> None:
    own = forward_of(model)
    if isinstance(own, Forward) and own.shared in siblings:
        raise AlreadyWrappedError(
            message(
                "models of which none contains another that is wrapped after it",
                "a model that an earlier one in the same call contains",
                where=module_label(own.name, model),
                remedy="leave it out, it is wrapped as a part; or give it first, to have a loss scale of its own",
            )
        )
    for fqn, module in model.named_modules():
        own = forward_of(module)
        if isinstance(own, Forward) and own.shared not in siblings:
            raise AlreadyWrappedError(
                message(
                    "a model of which no part is wrapped",
                    "a module that is wrapped already",
                    where=module_label(fqn, module),
                    remedy="wrap once, or call wrapprec.unwrap(model) before wrapping again",
                )
            )


def _place(model: nn.Module, shared: Shared, undo: UndoStack, plan: Plan) -> None:
    """Give every module its Forward, or bring the one it has up to date."""
    regions: Regions = {}
    placements = {placement.name: placement for placement in plan.placements}
    parametrised = within_parametrisations(model)
    managed = managed_below(model)
    others = other_types(model, shared.device)
    shared.sharded = bool(managed)
    if shared.sharded and plan.loss_scale is not None:
        check_not_compiled(model)
    for fqn, module in model.named_modules():
        own = forward_of(module)
        if isinstance(own, Forward) and own.shared is not shared:
            continue
        if is_graph(own):
            raise PolicyError(
                message(
                    "a model of which no forward replays a graph",
                    "a module that torch.cuda.make_graphed_callables was called on, whose graph keeps its precision",
                    where=module_label(fqn, module),
                    remedy="wrap first, then make graphs, and change no modules after that",
                )
            )
        if not isinstance(own, Forward) or own.module is not module:
            own = Forward(module, shared, fqn, replaced=own.replaced if isinstance(own, Forward) else own)
            undo.set_attribute(module, place_of(module), own)
        own.name = fqn
        placement = placements[fqn]
        if is_low(placement.precision.compute_dtype) and keeps_weights(module, parametrised):
            # The weight is computed in float32, and its result is cast: a spectral norm iterates on the originals, and
            # an embedding writes into its weight, which must be no copy.
            placement = dataclasses.replace(placement, precision=_FLOAT32, activations="restore")
        own.managed = managed.get(id(module), {}) if MARK in module.__dict__ else None
        _configure(own, placement, shared, regions, others)
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" and isinstance(module._orig_mod.__dict__.get("forward"), Forward):
            # Found now: found while dynamo traces, it would be something new, and compiled for, at the second call.
            module._orig_mod.__dict__["forward"].tree()


def _configure(
    forward: Forward, placement: Placement, shared: Shared, regions: Regions, others: tuple[str, ...]
) -> None:
    precision = placement.precision
    keeps = placement.activations == "keep"
    low = None if precision.casting is None else precision.activation_dtype
    by_autocast = precision.casting == "op" and copies_weights(forward.module, precision)
    stored = precision.param_dtype
    forward.stored_dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    forward.region = None if keeps else _region(precision, shared, placement.activations, regions, others)
    forward.wide = _region(precision, shared, "restore", regions, others) if keeps else None
    lends = precision.casting == "module" and not has_wide_statistics(forward.module)
    forward.lend_dtype = low if lends else None
    forward.freeze_dtype = low if lends or by_autocast else None
    forward.output_dtype = None
    if shared.mixed:
        around = shared.backend.native(shared.plan.policy.precision) if keeps else precision
        output = around.output_dtype
        assert isinstance(output, torch.dtype)
        forward.output_dtype = output
    forward.multi_tensor = shared.backend.lending.multi_tensor
    held = getattr(forward, "runner", None)  # a quantised weight's stays with it
    forward.runner = held if isinstance(held, Product) else runner_for(forward.module)
    if forward.runner is None and low is not None and mixes(forward.module, precision.casting == "module"):
        forward.runner = mended
    if precision.compute_dtype == "fp8" and isinstance(forward.module, nn.Linear):
        assert precision.recipe is not None and shared.backend.float8 is not None
        forward.runner = kernels(precision.recipe, not shared.backend.float8.multiplies(shared.device))
    forward.sparse = bool(getattr(forward.module, "sparse", False))
    forward.compiled = type(forward.module).__name__ == "OptimizedModule"
    forward.forget_tree()


def _region(
    precision: Precision, shared: Shared, activations: Activations, regions: Regions, others: tuple[str, ...]
) -> Region:
    precision = precision.surroundings
    key = precision, activations
    if key not in regions:
        doubles = any(p.precision.activation_dtype is torch.float64 for p in shared.plan.placements)
        upcasts = (shared.mixed or doubles) and activations != "given"
        regions[key] = Region(
            precision, shared.device.type, activations == "restore", upcasts, REAL if doubles else MIXABLE, others
        )
    return regions[key]


def adopt(model: nn.Module) -> UndoStack:
    """The undo stack of a model that was copied or loaded in wrapped state."""
    undo = UndoStack()
    forward = forward_of(model)
    forward.shared.root = weakref.ref(model)
    if forward.shared.converted is not None:
        forward.shared.converted.regrade(forward.shared.named_parameters())
    for below in forward.tree():
        undo.remember(below.module, place_of(below.module), below, below.replaced)
        adopt_quantised(below, undo)
    if forward.shared.converted is not None:
        undo.push(lambda: restore_copy(model, forward.shared.converted))
    return undo
