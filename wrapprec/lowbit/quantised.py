"""Puts quantised weights into a model and takes them out again; the modules stay the same objects, with their hooks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from wrapprec.errors import PolicyError, message, module_label
from wrapprec.lowbit.checkpoint import load_packed, save_packed
from wrapprec.lowbit.eightbits import Linear8, Training8
from wrapprec.lowbit.fourbits import Embedding4, Linear4
from wrapprec.lowbit.managers import check_stored
from wrapprec.lowbit.products import Quantised, library
from wrapprec.lowbit.quantisable import TRAINING, is_conv1d, is_packed
from wrapprec.standin import forward_of

if TYPE_CHECKING:
    from wrapprec.forward import Forward
    from wrapprec.plan import Plan
    from wrapprec.undo import UndoStack


def quantise(model: nn.Module, plan: Plan, undo: UndoStack, optimizers: Iterable[Optimizer] | None) -> None:
    """Store the weights that a plan has in a weight format in it.

    Every parameter keeps its numbers until `release`, so that undoing before that gives them back bit by bit.

    Args:
        model: wrapped, with a Forward on every module.
        plan: of the model.
        undo: takes every change.
        optimizers: those given to `wrap`; None where the model has changed since, and any weight that requires grad
            counts as trained.

    Raises:
        PolicyError: a weight would be trained, or is not finite, or bitsandbytes is not installed.
    """
    todo = []
    for forward in forward_of(model).tree():
        placement = plan.placement_or_none(forward.name)
        form = None if placement is None else placement.precision.param_dtype
        if not isinstance(form, str):
            continue
        if form == TRAINING:
            if "weight" not in (forward.managed or ()):  # what FSDP gathers is whole
                check_stored(form, forward.module._parameters["weight"], module_label(forward.name, forward.module))
            library(form)
            forward.runner = Training8()
            # What is cast once in `frozen()` would be rounded from other numbers.
            forward.freeze_dtype = forward.lend_dtype
        elif not is_packed(forward.module._parameters["weight"]):
            todo.append((forward, form))
    trained = None if optimizers is None else _params(optimizers)
    for forward, form in todo:
        weight = forward.module._parameters["weight"]
        if weight.requires_grad and (trained is None or id(weight) in trained):
            raise _trained(forward, form)
        check_stored(form, weight, module_label(forward.name, forward.module))
    silent = not trained
    for forward, form in todo:
        _store(forward, form, undo, silent)
    if todo:
        _keep_off_the_fast_path(model, {id(forward.module) for forward, _ in todo}, undo)


def _store(forward: Forward, form: str, undo: UndoStack, silent: bool) -> None:
    module: Any = forward.module
    parameter = module._parameters["weight"]
    kind = Embedding4 if isinstance(module, nn.Embedding) else Linear8 if form == "int8" else Linear4
    silent = silent and parameter.requires_grad
    runner = kind(form, parameter, type(module), silent=silent, transposed=is_conv1d(module))
    if not torch.isfinite(parameter.detach()).all():
        raise PolicyError(
            message(
                f"finite weights to store as {form}",
                "inf or nan, which would spread to the whole block that shares a scale",
                where=module_label(forward.name, module),
                remedy=f'load the right weights first, or add rules=[Rule("{forward.name}", "bf16-mixed")]',
            )
        )
    packed = runner.store(parameter)
    undo.push(functools.partial(restore, forward))
    forward.runner = runner
    module._parameters["weight"] = packed
    if type(module) is not nn.Linear:
        module.register_state_dict_post_hook(save_packed)
    else:
        # So that what looks for bitsandbytes' layers (PEFT) finds them; each is still the module it was.
        module.__dict__.update(_attributes(form))
        module.__class__ = _class_of(form)
    module.register_load_state_dict_pre_hook(load_packed)


def _keep_off_the_fast_path(model: nn.Module, quantised: set[int], undo: UndoStack) -> None:
    """In eval torch's encoder layers hand their weights to one kernel, which takes no quantised ones."""
    off = {
        nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
        nn.TransformerEncoder: ("use_nested_tensor", False),
    }
    for module in model.modules():
        for kind, (name, value) in off.items():
            if isinstance(module, kind) and any(id(part) in quantised for part in module.modules()):
                undo.set_attribute(module, name, value)


def _class_of(form: str) -> type:
    layers = library(form).nn
    found: type = layers.Linear8bitLt if form == "int8" else layers.Linear4bit
    return found


def _attributes(form: str) -> dict[str, Any]:
    """What bitsandbytes' constructors set on a layer."""
    if form == "int8":
        state = library("int8").MatmulLtState()
        state.has_fp16_weights = False
        return {"state": state, "index": None}
    return {
        "compute_dtype": None,
        "compute_type_is_set": True,
        "quant_state": None,
        "quant_storage": torch.uint8,
        # Or its own forward, should anybody call that, repacks the weight in eval.
        "support_avx512bf16_for_cpu": False,
    }


def release(model: nn.Module) -> None:
    """Give up the storage of the parameters whose numbers are quantised: from here on `unwrap` gives rounded ones.

    Args:
        model: wrapped.
    """
    for _, runner in _stored(model):
        if not runner.released:
            runner.released = True
            runner.parameter.data = runner.parameter.data.new_empty(0)


def restore(forward: Forward) -> None:
    """Give a module its class and its parameter back, with the numbers it had, or else what was stored of them."""
    runner, module = forward.runner, forward.module
    if not isinstance(runner, Quantised):
        return
    packed = module._parameters.get("weight")
    if runner.released and is_packed(packed):
        runner.parameter.data = runner.restore(packed)
    if is_packed(packed):
        module._parameters["weight"] = runner.parameter
    if type(module) is not runner.kind:
        for name in _attributes(runner.form):
            module.__dict__.pop(name, None)
        module.__class__ = runner.kind
    for hooks, ours in ((module._load_state_dict_pre_hooks, load_packed), (module._state_dict_hooks, save_packed)):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) is ours:
                del hooks[key]
    forward.runner = None


def adopt(forward: Forward, undo: UndoStack) -> None:
    """Take over a module of a copied or loaded model, whose undo stack does not know its quantised weight."""
    if isinstance(forward.runner, Quantised):
        undo.push(functools.partial(restore, forward))


def originals(model: nn.Module | None) -> set[int]:
    """The ids of the parameters whose modules hold a quantised weight in their place."""
    return set() if model is None else {id(runner.parameter) for _, runner in _stored(model)}


def check_attached(model: nn.Module | None, optimizer: Optimizer) -> None:
    """Refuse an optimizer of weights that were quantised.

    Args:
        model: wrapped.
        optimizer: to be attached.

    Raises:
        PolicyError: it holds a weight that required grad when it was quantised, as it was or as it is stored.
    """
    params = _params([optimizer])
    for forward, runner in () if model is None else _stored(model):
        held = {id(runner.parameter), id(forward.module._parameters.get("weight"))}
        if runner.parameter.requires_grad and held & params:
            raise _trained(forward, runner.form)


def _stored(model: nn.Module) -> Iterator[tuple[Forward, Quantised]]:
    root = forward_of(model)
    # Somebody may have given the instance another forward since.
    for forward in root.tree() if hasattr(root, "tree") else ():
        if isinstance(forward.runner, Quantised):
            yield forward, forward.runner


def _params(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _trained(forward: Forward, form: str) -> PolicyError:

    return PolicyError(
        message(
            f"frozen weights to store as {form}",
            "a weight that requires grad and that the optimizer trains",
            where=module_label(forward.name, forward.module),
            remedy="call model.requires_grad_(False) before adapters are added and the optimizer is built, or give what"
            f' trains a rule: rules=[Rule("{forward.name}", "bf16-mixed")]',
        )
    )
