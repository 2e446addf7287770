"""Casts and autocast at the borders between precisions, and the callable that stands in for a module's forward.

A region is a maximal run of modules with one precision. `Forward` is the only thing that `wrap` puts on a module: as
the instance's ``forward`` it is entered by a call of the module, by ``module.forward(x)``, in a checkpoint's
recomputation and under torch.compile alike, and its ``finally`` runs for every exception.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from wrapprec import traced
from wrapprec.cast import cast_tree, tensors_in
from wrapprec.dtypes import LOW
from wrapprec.errors import ModelChangedError, ScaleLeakError, WrapprecError, message, module_label
from wrapprec.mismatch import mismatch
from wrapprec.policy import Precision
from wrapprec.scope import Scope, check_dtype, check_pending, thread
from wrapprec.state import Shared

_NOTHING = contextlib.nullcontext()


class Region:
    """What holds inside one precision.

    Args:
        precision: the placement's.
        device_type: for autocast.
        restores: float32 inside, and outputs given back in the dtype around it (a hand-written norm).
        upcasts: the model mixes precisions, so a float32 region raises what comes in.
    """

    def __init__(self, precision: Precision, device_type: str, restores: bool, upcasts: bool) -> None:
        self.precision = precision
        self.device_type = device_type
        self.restores = restores
        self.autocasts = precision.casting == "op"
        self.low = precision.compute_dtype if precision.casting is not None else None
        self.casts = precision.casts_inputs if self.low is not None else upcasts
        self.by_module = precision.casting == "module" and self.casts

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as this region wants it; nothing where it is so already."""
        if self.autocasts:
            cache = torch.is_autocast_cache_enabled()
            return torch.autocast(self.device_type, dtype=self.low, cache_enabled=cache)
        if torch.is_autocast_enabled(self.device_type):
            return torch.autocast(self.device_type, enabled=False)
        return _NOTHING

    def cast_inputs(self, tree: Any, on_cast: Any = None) -> Any:
        """Cast what comes in: to the compute dtype, or up to float32."""
        return cast_tree(tree, self.low or torch.float32, on_cast)

    def give_back(self, out: Any, around: Region | None) -> Any:
        """Cast what goes out into the region `around`."""
        if self.low is not None:
            return cast_tree(out, self.precision.output_dtype)
        if self.restores and around is not None and around.by_module:
            return cast_tree(out, around.low)
        return out


class Forward:
    """Stands in for the `forward` of one module of a wrapped model.

    Args:
        module: whose forward this is.
        shared: the wrapped model's state.
        name: the module's qualified name.
        replaced: the instance's earlier `forward`, or None.

    Attributes:
        region: the precision it computes in; None for "whatever is around" (a norm whose kernel takes the mix).
        lend_dtype: the dtype its own parameters are lent in, or None for their own.
        freeze_dtype: the dtype they are lent in inside `frozen()`.
        output_dtype: the dtype of floating outputs where this module opens a scope, or None to leave them.
        multi_tensor: its weights are cast in one pass with others.
        buckets: which bucket each of its parameters is lent in.
    """

    region: Region | None
    lend_dtype: torch.dtype | None
    freeze_dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    multi_tensor: bool

    def __init__(self, module: nn.Module, shared: Shared, name: str, replaced: Any) -> None:
        self.module = module
        self.shared = shared
        self.name = name
        self.replaced = replaced
        self.buckets: dict[str, Any] = {}
        self._tree: list[tuple[Forward, tuple[Any, ...]]] = []

    @property
    def __wrapped__(self) -> Any:
        """The original, for inspect.signature."""
        return self.original

    @property
    def original(self) -> Any:
        """The forward this one stands in for."""
        if self.replaced is None:
            return type(self.module).forward.__get__(self.module)
        return self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return traced.call(self, args, kwargs)
        scope = thread.scope
        if scope is not None and scope.shared is self.shared:
            if id(self) not in scope.done:
                scope.lend([self])
            return self._enter(scope, args, kwargs)
        return self._open(args, kwargs)

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shared = self.shared
        self._check()
        scope = Scope(shared, self._recomputes(args, kwargs))
        thread.scope = scope
        try:
            given = args, kwargs
            scope.lend(self.tree())
            args, kwargs = scope.enter(given)
            out = self._enter(scope, args, kwargs)
            return scope.leave(self, out, given)
        finally:
            scope.close()

    def _enter(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        around = scope.region
        region = self.region if self.region is not None else around
        crosses = region is not around
        writes: list[tuple[Tensor, Tensor, int]] = []
        if region is not None and region.casts and (crosses or (region.by_module and self.module._parameters)):
            args, kwargs = region.cast_inputs((args, kwargs), lambda old, new: writes.append((old, new, _version(new))))
        if not crosses:
            out = self._call(args, kwargs)
        else:
            scope.region = region
            try:
                with region.context():
                    out = self._call(args, kwargs)
            finally:
                scope.region = around
            if around is not None:
                out = region.give_back(out, around)
        for old, new, version in writes:
            if _version(new) != version:
                self._write_back(old, new)
        return out

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if self.shared.diagnosis is not None:
                return self.shared.diagnosis.call(self, args, kwargs)
            if self.replaced is None:
                return type(self.module).forward(self.module, *args, **kwargs)
            return self.replaced(*args, **kwargs)
        except WrapprecError:
            raise
        except RuntimeError as error:
            better = mismatch(self, error)
            if better is None:
                raise
            raise better from error

    def _write_back(self, old: Tensor, new: Tensor) -> None:
        """A cast input was written in place (a cache): bring the values to the tensor the caller holds."""
        if new.requires_grad and torch.is_grad_enabled():
            raise ModelChangedError(
                message(
                    "a module that does not write into an input that had to be cast",
                    f"an input of shape {tuple(old.shape)} cast from {old.dtype} to {new.dtype} and then modified in place",
                    where=module_label(self.name, self.module),
                    remedy=f"pass it in {new.dtype}, or add a rule that keeps this module in {old.dtype}",
                )
            )
        with torch.no_grad():
            old.copy_(new)

    # What is below

    def tree(self) -> list[Forward]:
        """The Forwards of this module's subtree that belong to this wrapped model, in registration order."""
        if not self._tree:
            self._tree = [(f, tuple(f.module._modules.values())) for f in _walk(self)]
        return [forward for forward, _ in self._tree]

    def forget_tree(self) -> None:
        """The subtree has changed."""
        self._tree = []

    def _check(self) -> None:
        """Take up, or refuse, what changed in the model since the last forward."""
        shared = self.shared
        if shared.root is None and self.name == "":
            import weakref

            shared.root = weakref.ref(self.module)
        if not self._tree:
            self.tree()
        stale = any(tuple(f.module._modules.values()) != children for f, children in self._tree)
        device = None
        for forward, _ in self._tree:
            for key, param in forward.module._parameters.items():
                if param is None:
                    continue
                device = device or param.device
                if param.dtype is not torch.float32 and shared.mixed:
                    problem = check_dtype(forward, key, param)
                    if problem is not None:
                        raise ModelChangedError(problem)
        if stale or (device is not None and device.type != "meta" and device != shared.device):
            from wrapprec.install import refresh

            refresh(self)
        for owner in shared.owners:
            owner.owned()
        if shared.scaler is not None and torch.is_grad_enabled():
            check_pending(shared)
            if shared.scaler.touched and not any(owner.alive for owner in shared.owners):
                shared.scaler.settle()

    def _recomputes(self, args: Any, kwargs: Any) -> bool:
        """Whether this call recomputes, in backward, a checkpointed block of an earlier scope's inside.

        Only a reentrant checkpoint's recomputation feeds gradients through the graph made here. It may also be of a
        scope's outside (``checkpoint(model, x)``), where the border is needed.

        Raises:
            ScaleLeakError: under a loss scale, and nothing tells the two apart.
        """
        task = torch._C._current_graph_task_id()
        if task == -1:
            return False
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", ""):
            return True
        scaler = self.shared.scaler
        if scaler is not None and task not in scaler.borders:
            return False
        precisions = {p.precision for p in self.shared.plan.placements if p.precision.casting is not None}
        device_type = self.shared.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            return any(p.casting == "op" and p.compute_dtype == dtype for p in precisions)
        if any(t.dtype in LOW for t in tensors_in((args, kwargs))):
            return True
        if scaler is None or all(p.casting == "op" for p in precisions):
            return False
        raise ScaleLeakError(
            message(
                "a recomputation of which it is known whether it belongs to the inside of a wrapped model",
                "a reentrant checkpoint whose inputs are float32, under a loss scale",
                where=module_label(self.name, self.module),
                remedy="torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            )
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        import copy

        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__getstate__().items():
            setattr(new, key, copy.deepcopy(value, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tree": [], "buckets": {}}


def _walk(forward: Forward) -> list[Forward]:
    found = []
    for module in forward.module.modules():
        own = module.__dict__.get("forward")
        if isinstance(own, Forward) and own.shared is forward.shared:
            found.append(own)
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
