"""Walks the graph of a loss, before a gradient is computed, to find where a tensor crosses the scale border unseen.

Two states: outside, or inside one or more scopes. Crossing an output's border means inside, crossing a lent weight's
or an input's border means outside again. Reaching a lent weight from outside, or a leaf from inside, is a gradient
that would be wrong by a factor of S.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wrapprec.border import Border
from wrapprec.boundary import Enter, Inward, Leave, Lend, Return, ScaleDown, ScaleUp
from wrapprec.current import thread
from wrapprec.errors import ScaleLeakError, message, module_label
from wrapprec.lent import originals
from wrapprec.scale import Scaler
from wrapprec.schedule import Schedule

if TYPE_CHECKING:
    from wrapprec.forward import Forward

GOES_IN: tuple[Any, ...] = (Leave, ScaleDown, Return)
GOES_OUT: tuple[Any, ...] = (Enter, Lend, ScaleUp)


def crossing(node: Any) -> Any:
    """Which Function of `boundary` a node belongs to, or None; under torch.func a node is of a class made there."""
    kind = getattr(node, "crossing", None) if isinstance(getattr(node, "border", None), Border) else None
    return kind if kind in GOES_IN or kind in GOES_OUT else None


_due: dict[int, tuple[weakref.ref[Schedule], weakref.ref[Scaler], weakref.ref[Any]]] = {}
"""Wrapped models whose next backward is audited; torch's entry point is replaced only while there are some."""

_arming = threading.RLock()
"""Held while torch's entry point is replaced or put back; a garbage collection in between may want to put it back."""

# What `Tensor.backward`, `torch.autograd.backward` and `torch.autograd.grad` call, under whatever name a program has
# imported those; the same in torch 2.9 to 2.13.
_NAME = "_engine_run_backward"
_real = getattr(torch.autograd, _NAME)


def prepare(schedule: Schedule, scaler: Scaler, forward: Forward, out: Any, doubtful: bool = False) -> bool:
    """Arm an audit of the next backward if one is due or there is doubt, given what a forward returned.

    Returns:
        Whether it is.
    """
    if doubtful:
        schedule.left = max(schedule.left, 1)
    if not schedule.is_due((forward.name, forward.module.training, _shape(out))):
        return False
    gone = functools.partial(_dismiss, id(schedule))
    # A replica is gone by the time an error wants to name its parameters.
    named = forward if forward.replica is None else forward.replica.origin
    with _arming:
        _due[id(schedule)] = weakref.ref(schedule, gone), weakref.ref(scaler), weakref.ref(named.module)
        setattr(torch.autograd, _NAME, _audited)
    return True


def dismiss(schedule: Schedule) -> None:
    """The model is no longer wrapped: nothing is due."""
    _dismiss(id(schedule))


def _dismiss(key: int, gone: object = None) -> None:
    with _arming:
        _due.pop(key, None)
        if not _due and getattr(torch.autograd, _NAME) is _audited:
            setattr(torch.autograd, _NAME, _real)


def _shape(out: Any) -> Any:
    if isinstance(out, (tuple, list)):
        return type(out), tuple(_shape(item) for item in out[:8])
    if isinstance(out, dict):
        return type(out), tuple(out)
    return type(out)


@functools.wraps(_real)
def _audited(roots: Any, *args: Any, **kwargs: Any) -> Any:
    # A graph inside forward is inside all along; the borders themselves notice a gradient that leaves it.
    if thread.scope is None and torch._C._current_graph_task_id() == -1:
        # Positions as in torch.autograd.backward and grad: grad_tensors, retain_graph, create_graph, inputs.
        inputs = kwargs.get("inputs", args[3] if len(args) > 3 else ())
        modules = [module for module in (due[2]() for due in list(_due.values())) if module is not None]
        try:
            met = walk(roots, modules, inputs)
        except BaseException:
            # Nothing stays in place; whichever model is due is armed again by its next forward.
            for key in list(_due):
                _dismiss(key)
            raise
        for key, (schedule, scaler, _) in list(_due.items()):
            if scaler() in met:
                # Another model's backward says nothing about this one.
                _discharge(key, schedule())
    return _real(roots, *args, **kwargs)


def _discharge(key: int, schedule: Schedule | None) -> None:
    if schedule is not None:
        schedule.left -= 1
    _dismiss(key)


def _as_tuple(tensors: Any) -> tuple[Any, ...]:
    if isinstance(tensors, Tensor) or hasattr(tensors, "node"):
        return (tensors,)
    return tuple(tensors or ())


def roots_of(tensors: Any) -> list[Any]:
    nodes = (one.grad_fn if isinstance(one, Tensor) else getattr(one, "node", None) for one in _as_tuple(tensors))
    return [node for node in nodes if node is not None]


def _tensor(one: Any) -> Tensor | None:
    return one if isinstance(one, Tensor) else None


Stack = tuple[Border, ...]


def walk(
    roots: Any, modules: list[Any], inputs: Any = (), around: Stack = (), known: Iterable[Tensor] = ()
) -> set[Scaler]:
    """Follow the graph from `roots`, knowing at each node which scopes it is inside of.

    Args:
        roots: a tensor or graph edge, or several: what `torch.autograd.backward` takes.
        modules: wrapped modules, to name parameters.
        inputs: what `torch.autograd.grad` differentiates with respect to.
        around: the scopes that `roots` are inside of.
        known: leaves whose gradients go on inside: the inputs of a reentrant checkpoint.

    Returns:
        The loss scales whose borders the graph crosses.

    Raises:
        ScaleLeakError: naming the parameter or tensor whose gradient would be wrong.
    """
    wanted = {roots_of(one)[0]: one for one in _as_tuple(inputs) if roots_of(one)}
    todo: list[tuple[Any, Stack]] = [(node, around) for node in roots_of(roots)]
    passed = {id(leaf) for leaf in known}
    seen: set[tuple[Any, tuple[int, ...]]] = set()
    met: set[Scaler] = set()
    lent = {
        id(param)
        for top in modules
        for below in top.modules()
        if _is_compiled(below)
        for _, param in nn.Module.named_parameters(below)
    }
    while todo:
        node, inside = todo.pop()
        key = node, tuple(id(border) for border in inside)
        if key in seen:
            continue
        seen.add(key)
        if inside and node in wanted and crossing(node) not in GOES_OUT:
            what = "is inside forward, where gradients are scaled, and was asked for"
            raise _leak(_tensor(wanted[node]), what, modules)
        after = _cross(node, inside, modules, met)
        if hasattr(node, "variable") and not _is_true(node, after, passed):
            raise _leak(node.variable, "was used inside forward without crossing the border", modules)
        by_graph = bool(after) and node.name() in _COMPILED
        for below, _ in node.next_functions:
            if below is None or (by_graph and id(getattr(below, "variable", None)) in lent):
                continue
            todo.append((below, after))
    return met


def _is_true(node: Any, inside: Stack, passed: set[int]) -> bool:
    """The gradient of a leaf's node is true, or goes on inside, or nobody can read it."""
    return id(node.variable) in passed or _comes_out(node.variable, inside) or _is_held_by_graph_alone(node)


def _comes_out(leaf: Tensor, inside: Stack) -> bool:
    """The gradient of a leaf is true: it is outside, or was made inside and divides by the scale itself."""
    hooks = (leaf._backward_hooks or {}).values()
    border = next((hook.border for hook in hooks if isinstance(hook, Inward)), None)
    if border is None:
        return not inside
    return len(inside) > 0 and border.same_factor(inside[-1])


_COMPILED = frozenset({"CompiledFunctionBackward", "ApplyTemplateBackward", "LendOneBackward"})
"""Nodes of compiled graphs, by backend. What such a graph lends, it lends inside."""


def _is_compiled(module: Any) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _is_held_by_graph_alone(node: Any) -> bool:
    """Whether nobody can read the gradient of a leaf: forward made it and dropped it (`x.requires_grad = True`)."""
    return not isinstance(node.variable, nn.Parameter) and _references(node) <= _references_at_least()


def _references(node: Any) -> int:
    leaf = node.variable
    return sys.getrefcount(leaf)


@functools.lru_cache(maxsize=1)
def _references_at_least() -> int:
    """The count of a leaf that Python code holds nowhere: in torch 2.13 the tensor itself holds its Python object."""
    made = torch.ones(1, requires_grad=True) * 1
    assert made.grad_fn is not None
    return _references(made.grad_fn.next_functions[0][0])


def _cross(node: Any, inside: Stack, modules: list[Any], met: set[Scaler]) -> Stack:
    kind = crossing(node)
    if kind is None:
        return inside
    border: Border = node.border
    met.add(border.scaler)
    around = inside[-1] if inside else None
    if kind in GOES_IN:
        if kind is Leave and border.outer is not around:
            raise _leak(None, "left one forward and was used in another without crossing its border", modules)
        return (*inside, border)
    # The same scale is the same factor, also where a tensor went from one forward to the next unseen.
    if not border.same_factor(around):
        weight = next((t for t in getattr(node, "tensors", []) if t.requires_grad), None)
        raise _leak(weight, "is reached by a tensor that left forward without crossing the border", modules)
    return () if kind is Lend else inside[:-1]


def _leak(tensor: Tensor | None, what: str, modules: list[Any]) -> ScaleLeakError:
    return ScaleLeakError(
        message(
            "every tensor to cross the wrapped model's border through its inputs, outputs or parameters, because a loss"
            " scale is on",
            f"{_label(tensor, modules)}, which {what}",
            remedy="return the tensor from forward, or pass it through wrapprec.leave(tensor) where a hook, closure or"
            " global takes it out; register what forward uses as a Parameter or submodule, or pass it as an input;"
            " or use a bf16 policy, which needs no loss scale",
        )
    )


def _label(tensor: Tensor | None, modules: list[Any]) -> str:
    if tensor is None:
        return "a tensor"
    for top in modules:
        for module in top.modules():
            for name, param in originals(module).items():
                if param is tensor:
                    known = module.__dict__.get("forward")
                    named = hasattr(known, "shared")
                    label = module_label(known.name, module) if named else repr(type(module).__name__)
                    return f"parameter {name!r} of module {label}"
    return f"a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} that is no parameter of the model"
