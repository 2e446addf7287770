"""Tensors that come into a scope by other ways than as arguments: inside objects that are given, and on the modules.

A cache that goes from forward to forward, a Distribution, a memory kept on a module, a prompt that is a plain
attribute. For the time of the scope they are replaced by tensors that have crossed the border; then those that are
still there are put back.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wrapprec.border import Border
from wrapprec.boundary import Enter
from wrapprec.cast import mend, opaque_in
from wrapprec.checks import version_of
from wrapprec.dtypes import MIXABLE
from wrapprec.errors import ScaleLeakError, message, module_label
from wrapprec.escape import mend_attributes

if TYPE_CHECKING:
    from wrapprec.forward import Forward
    from wrapprec.region import Region
    from wrapprec.scope import Scope

_ENTER: Any = vars(Enter)["_backward_cls"]

_widened: dict[int, weakref.ref[Any]] = {}
"""Opaque objects in which float16 tensors became float32 on their way out: what is detached there goes back, too."""


def any_widened() -> bool:
    """Whether there are objects of which detached tensors may have to be cast."""
    return bool(_widened)


def note_widened(values: Any) -> None:
    """Remember the opaque objects in a tree, as float16 tensors in them have become float32."""
    for value in opaque_in(values):
        try:
            _widened[id(value)] = weakref.ref(value, functools.partial(_forget, id(value)))
        except TypeError:
            continue  # no weak references: a detached tensor in it stays float32


def _forget(key: int, gone: object) -> None:
    _widened.pop(key, None)


class Carried:
    """What one scope has replaced in objects that are not its own.

    Args:
        scope: whose border is crossed.
        forward: of the module that opened it.
    """

    def __init__(self, scope: Scope, forward: Forward) -> None:
        self.border: Border | None = scope.border
        self.outer = scope.outer
        self.forward = forward
        self.region: Region | None = forward.region
        # By the id of what stands there now: what was given, what stands there, and its version then.
        self.given: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.made: dict[int, Tensor] = {}
        # The opaque objects that were given, and those of them in which something was replaced.
        self.opaque: list[Any] = []
        self.objects: list[Any] = []
        self.modules: list[nn.Module] = []
        # Other threads train too, so that nothing on the modules can be replaced: an audit has to look.
        self.doubtful = False

    def bring_in(self, tree: Any) -> None:
        """Replace what requires grad inside the opaque objects of a tree of arguments."""
        region = self.region
        low = region.low if region is not None and region.by_module else None
        self.opaque = list(opaque_in(tree))
        for value in self.opaque:
            known = low is not None and id(value) in _widened
            if self.border is None and not known:
                continue
            before = len(self.given)
            mend(functools.partial(self._enter, low=low, detached=known), value)
            if len(self.given) > before:
                self.objects.append(value)

    def bring_in_attributes(self, tree: list[Forward], alone: bool) -> None:
        """Replace what requires grad in attributes of the modules: what an earlier forward or the user left there.

        Args:
            tree: the scope's modules.
            alone: no other thread trains the model, which would see the replacements, even outside of forward.
        """
        registered = self.forward.shared.ids

        def cross(tensor: Tensor) -> Tensor:
            if isinstance(tensor, nn.Parameter) and id(tensor) in registered:
                return tensor  # a list of the model's own parameters
            if not tensor.requires_grad or alone:
                return self._enter(tensor)
            self.doubtful = True
            return tensor

        holders = self.forward.shared.holders
        seen: set[int] = set()
        for forward in tree:
            before = len(self.given)
            mend_attributes(cross, forward.module, seen, holders.get(forward.name, ()))
            if len(self.given) > before:
                self.modules.append(forward.module)

    def _enter(self, tensor: Tensor, low: torch.dtype | None = None, detached: bool = False) -> Tensor:
        # Where float16 tensors were widened, also those that the user has detached since are made narrow again.
        if id(tensor) in self.given or not (tensor.requires_grad or detached):
            return tensor
        if id(tensor) in self.made:
            return self.made[id(tensor)]
        inside = tensor
        if tensor.requires_grad and self.border is not None:
            self._check_thread(tensor)
            inside = Enter.apply(tensor, self.border)
        # What became float32 on its way out becomes float16 again.
        narrow = getattr(tensor.grad_fn, "narrow", None)
        if narrow is not None and self.region is not None and self.region.low is narrow:
            low = narrow
        if low is not None and inside.dtype in MIXABLE:
            inside = inside.to(low)
        if inside is not tensor:
            self.given[id(inside)] = tensor, inside, version_of(inside)
            self.made[id(tensor)] = inside
        return inside

    def _check_thread(self, tensor: Tensor) -> None:
        """Refuse a tensor that another thread has replaced in the same object."""
        node: Any = tensor.grad_fn
        # It may have been cast after it was replaced.
        below = node.next_functions[0][0] if node is not None and node.next_functions else None
        node = next((one for one in (node, below) if isinstance(one, _ENTER)), None)
        border: Border | None = None if node is None else node.border
        if border is None or border.extent is None or border.extent.last is not None:
            return
        scope = self.outer
        while scope is not None:
            if scope.border is border:
                return
            scope = scope.outer
        raise ScaleLeakError(
            message(
                "an object with tensors that require grad in the forward of one thread at a time",
                f"an object with a tensor of shape {tuple(tensor.shape)} that a forward on another thread is using",
                where=module_label(self.forward.name, self.forward.module),
                remedy="give each thread an object of its own, or pass the tensor itself as an argument",
            )
        )

    def original(self, tensor: Tensor) -> Tensor:
        """What was given where `tensor` stands; the tensor itself if it is another, or was modified in place."""
        given, inside, version = self.given.get(id(tensor), (tensor, None, 0))
        return given if inside is None or version_of(inside) == version else tensor

    def put_back(self) -> None:
        """Put everything back as it was; once."""
        given, self.given = self.given, {}
        if given:

            def back(tensor: Tensor) -> Tensor:
                if id(tensor) not in given:
                    return tensor
                old, new, version = given[id(tensor)]
                if not new.requires_grad and version_of(new) != version:
                    with torch.no_grad():
                        old.copy_(new)
                return old

            for value in self.objects:
                mend(back, value)
            for module in self.modules:
                mend_attributes(back, module, set())
