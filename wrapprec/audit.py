"""Walks the graph of a loss, before a gradient is computed, to find where a tensor crosses the scale border unseen.

Two states: outside, or inside one or more scopes. Crossing an output's border means inside, crossing a lent weight's
or an input's border means outside again. Reaching a lent weight from outside, or a leaf from inside, is a gradient
that would be wrong by a factor of S.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wrapprec.boundary import Border, Enter, Leave, Lend, Return, ScaleDown, ScaleUp
from wrapprec.errors import ScaleLeakError, message, module_label
from wrapprec.lent import originals

if TYPE_CHECKING:
    from wrapprec.region import Forward

_FIRST = 3
_EVERY = 1000

_GOES_IN = tuple(f._backward_cls for f in (Leave, ScaleDown, Return))  # type: ignore[attr-defined]
_GOES_OUT = tuple(f._backward_cls for f in (Enter, Lend, ScaleUp))  # type: ignore[attr-defined]


class Schedule:
    """When an audit of one wrapped model is due: its first backwards, after a change, and now and then."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Audit the next backwards again: after `wrap`, after a checkpoint was loaded, after modules changed."""
        self.left = _FIRST
        self.forwards = 0
        self.known: set[Any] = set()

    def is_due(self, signature: Any) -> bool:
        self.forwards += 1
        if signature not in self.known:
            self.known.add(signature)
            self.left = max(self.left, 1)
        if self.forwards % _EVERY == 0:
            self.left = max(self.left, 1)
        return self.left > 0


_due: weakref.WeakKeyDictionary[Schedule, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""Wrapped models whose next backward is audited; torch's entry points are replaced only while it is not empty."""

_real = {name: getattr(torch.autograd, name) for name in ("backward", "grad")}


def prepare(schedule: Schedule, forward: Forward, out: Any) -> None:
    """Arm an audit of the next backward if one is due, given what a forward returned."""
    if not schedule.is_due((forward.name, forward.module.training, _shape(out))):
        return
    _due[schedule] = weakref.ref(forward.module)
    for name, real in _real.items():
        if getattr(torch.autograd, name) is real:
            setattr(torch.autograd, name, _audited(name, real))


def _shape(out: Any) -> Any:
    if isinstance(out, (tuple, list)):
        return type(out), tuple(_shape(item) for item in out[:8])
    if isinstance(out, dict):
        return type(out), tuple(out)
    return type(out)


def _audited(name: str, real: Any) -> Any:
    @functools.wraps(real)
    def audited(*args: Any, **kwargs: Any) -> Any:
        from wrapprec.scope import thread

        roots = args[0] if args else kwargs.get("tensors", kwargs.get("outputs", ()))
        # A graph inside forward is inside all along; the borders themselves notice a gradient that leaves it.
        if thread.scope is None:
            walk(roots, _disarm())
        return real(*args, **kwargs)

    return audited


def _disarm() -> list[Any]:
    """Put torch's entry points back, and say which modules were to be audited."""
    modules = [module for module in (ref() for ref in _due.values()) if module is not None]
    for schedule in list(_due):
        schedule.left -= 1
    _due.clear()
    for name, real in _real.items():
        if hasattr(getattr(torch.autograd, name), "__wrapped__"):
            setattr(torch.autograd, name, real)
    return modules


def _roots(roots: Any) -> list[Any]:
    if isinstance(roots, Tensor):
        roots = (roots,)
    nodes = (root.grad_fn if isinstance(root, Tensor) else getattr(root, "node", None) for root in roots)
    return [node for node in nodes if node is not None]


Stack = tuple[Border, ...]


def walk(roots: Any, modules: list[Any]) -> None:
    """Follow the graph from `roots`, knowing at each node which scopes it is inside of.

    Args:
        roots: a tensor or graph edge, or several: what `torch.autograd.backward` takes.
        modules: wrapped modules, to name parameters.

    Raises:
        ScaleLeakError: naming the parameter or tensor whose gradient would be wrong.
    """
    todo: list[tuple[Any, Stack]] = [(node, ()) for node in _roots(roots)]
    seen: dict[tuple[Any, tuple[int, ...]], None] = {}
    while todo:
        node, inside = todo.pop()
        key = node, tuple(id(border) for border in inside)
        if key in seen:
            continue
        seen[key] = None
        after = _cross(node, inside, modules)
        if hasattr(node, "variable") and after:
            raise _leak(node.variable, "was used inside forward without crossing the border", modules)
        for below, _ in node.next_functions:
            if below is not None:
                todo.append((below, after))


def _cross(node: Any, inside: Stack, modules: list[Any]) -> Stack:
    around = inside[-1] if inside else None
    if isinstance(node, _GOES_IN) and node.border is not None:
        if isinstance(node, _GOES_IN[0]) and node.border.outer is not around:
            raise _leak(None, "left one forward and was used in another without crossing its border", modules)
        return (*inside, node.border)
    if isinstance(node, _GOES_OUT) and node.border is not None:
        # The same scale is the same factor, also where a tensor went from one forward to the next unseen.
        if around is None or around.scale is not node.border.scale:
            weight = next((t for t in getattr(node, "tensors", []) if t.requires_grad), None)
            raise _leak(weight, "is reached by a tensor that left forward without crossing the border", modules)
        return () if isinstance(node, _GOES_OUT[1]) else inside[:-1]
    return inside


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
                    return f"parameter {name!r} of module {module_label(module.__dict__['forward'].name, module)}"
    return f"a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} that is no parameter of the model"


def borders_below(tensor: Tensor) -> list[Border]:
    """The borders that a tensor is inside of, found where its graph reaches lent weights and inputs from inside."""
    found: dict[int, Border] = {}
    todo, seen = _roots(tensor), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, _GOES_OUT) and node.border is not None:
            found[id(node.border.scale)] = node.border
        elif not isinstance(node, _GOES_IN):
            todo += [below for below, _ in node.next_functions if below is not None]
    return list(found.values())


