"""The callable that stands in for a module's forward.

`Forward` is the only thing that `wrap` puts on a module: as the instance's ``forward`` it is entered by a call of the
module, by ``module.forward(x)``, in a recomputed checkpoint and under torch.compile alike, and its ``finally``
runs for every exception.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import compiler, is_grad_enabled, nn

from wrapprec import again, levels, traced
from wrapprec.capture import Recorded, has_no_backward, is_symbolic
from wrapprec.census import Census
from wrapprec.checks import check_backwards, check_stored, sharded_since, warn_of_autocast, warn_of_hooks
from wrapprec.copies import called_on
from wrapprec.current import thread
from wrapprec.errors import ModelChangedError, module_label
from wrapprec.mismatch import mismatch
from wrapprec.operands import apart
from wrapprec.recompute import recomputed, remember_frame
from wrapprec.region import Region
from wrapprec.replicas import Replica, is_replica, replicated
from wrapprec.scope import Scope
from wrapprec.sharded import MARK, Managed
from wrapprec.standin import StandIn, forward_of
from wrapprec.state import Shared
from wrapprec.writes import Casts, Containers


def _takes_a_mix() -> bool:
    """Neither torch.func nor forward-mode AD nor a tracer is on, which have no rules for operations on mixed dtypes."""
    return not levels.any_running() and torch._C._get_tracing_state() is None


class Forward(Recorded, StandIn):
    """Stands in for the `forward` of one module of a wrapped model.

    Args:
        module: whose forward this is.
        shared: the wrapped model's state.
        name: the module's qualified name.
        replaced: the instance's earlier `forward`, or None.

    Attributes:
        region: the precision it computes in; None for "whatever is around" (a norm whose kernel takes the mix).
        wide: where `region` is None, what stands in under torch.func, forward-mode AD and export: they take no mix.
        stored_dtype, lend_dtype: the dtypes its own parameters are to have, and are lent in (or None for their own).
        freeze_dtype: the dtype they are lent in inside `frozen()`.
        managed: of its parameters, those that FSDP manages; None where it did not manage the module at `wrap`.
        output_dtype: the dtype of floating outputs where this module opens a scope, or None to leave them.
        multi_tensor: its weights are cast in one pass with others.
        sparse: its weights get sparse gradients, which torch's own cast cannot take back.
        compiled: it is what `torch.compile` returned for a module.
        buckets: which bucket each of its parameters is lent in.
        computed: which of its parameters hooks compute which weights from.
        runner: how its original forward is run; None for a plain call.
        replica: what is known besides where the module is a replica of nn.DataParallel.
    """

    region: Region | None
    wide: Region | None
    stored_dtype: torch.dtype
    lend_dtype: torch.dtype | None
    freeze_dtype: torch.dtype | None
    managed: dict[str, Managed] | None
    output_dtype: torch.dtype | None
    multi_tensor: bool
    sparse: bool
    runner: Any
    compiled: bool
    replica: Replica | None = None

    def __init__(self, module: nn.Module, shared: Shared, name: str, replaced: Any) -> None:
        self.module = module
        self.shared = shared
        self.name = name
        self.replaced = replaced
        self.buckets: dict[str, Any] = {}
        self.computed: dict[str, str] = {}
        self._forwards: list[Forward] | None = None
        self._census: Census | None = None

    @property
    def original(self) -> Any:
        """The forward this one stands in for."""
        if self.replaced is None:
            return type(self.module).forward.__get__(self.module)
        return self.replaced

    __wrapped__ = original  # for inspect.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What `torch.compiler.is_compiling` says, without its two calls.
        if compiler.is_dynamo_compiling() or compiler._is_compiling_flag:
            return traced.call(self, args, kwargs)
        scope = thread.scope
        if scope is None or scope.shared is not self.shared:
            return self._open(args, kwargs)
        if scope.grad and not is_grad_enabled():
            scope.suspended = True
        module = self.module
        if (
            self in scope.simple
            and scope.mending is None
            and (scope.border is None or not (scope.watched or module._forward_hooks))
        ):
            region = self.region
            if region is None and _takes_a_mix():
                region = scope.region
            if (
                region is not None
                and region is scope.region
                and not (region.by_module and module._parameters and region.is_cast(args, kwargs))
            ):
                # Most calls: nothing is to be done. What follows does the same for them, in more steps.
                try:
                    if kwargs:
                        return type(module).forward(module, *args, **kwargs)
                    return type(module).forward(module, *args)
                except (RuntimeError, ValueError) as error:
                    better = mismatch(self, error)
                    if better is None:
                        raise
                    raise better from error
        if self not in scope.done:
            scope.lend([self])
        if scope.watched:
            scope.look_at_watched()
        out = apart(self, scope, args, kwargs) if scope.mending else self._enter(scope, args, kwargs)
        return scope.watch(out) if module._forward_hooks and scope.border is not None else out

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = called_on(self, depth=2)
        copied = called is not self.module
        if copied and not is_replica(called):
            return self.move_to(called)(*args, **kwargs)
        if is_symbolic():
            return self._call(args, kwargs)
        if self.shared.scaler is not None and is_grad_enabled() and has_no_backward(self):
            with torch.no_grad():
                return self._open(args, kwargs)
        in_backward = torch._C._current_graph_task_id() != -1
        self._check(in_backward)
        part_of = recomputed(self, thread.scope) if in_backward else None
        if part_of is None:
            remember_frame(self.shared)
            if not in_backward and thread.scope is None and not copied:
                warn_of_autocast(self)
        if not copied:
            return self._run(Scope(self, part_of), args, kwargs)
        with replicated(self, called, (args, kwargs)) as (mine, around):
            return mine._run(Scope(mine, part_of, joined=around), args, kwargs)

    def _run(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            thread.scope = scope
            again.enter(scope)
            scope.lend(self.tree())
            given = args, kwargs
            args, kwargs = scope.enter(self, given)
            containers = Containers(given, (args, kwargs)) if scope.inputs else None
            out = self._enter(scope, args, kwargs)
            if containers is not None:
                containers.bring_back()
            return scope.leave(self, out, given)
        finally:
            scope.close()
            again.leave(scope)

    def _enter(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.computed:
            scope.computed.lend(self, scope)
        around = scope.region
        region = self.region
        if region is None:
            region = around if _takes_a_mix() else self.wide
        crosses = region is not around
        casts = None
        owns = region is not None and (
            (region.casts and (crosses or (region.by_module and self._owns())))
            or (region.narrows and region.meets(around))
        )
        if region is not None and owns and region.is_cast(args, kwargs):
            casts = Casts(region.cast_inputs, args, kwargs)
            args, kwargs = casts.args, casts.kwargs
        if not crosses or region is None:
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
        if casts is not None and casts.tensors:
            casts.bring_back(module_label(self.name, self.module))
        return out

    def _owns(self) -> bool:
        return bool(self.module._parameters) if self.replica is None else self.replica.owns

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if self.shared.diagnosis is not None:
                return self.shared.diagnosis.call(self, args, kwargs)
            if self.runner is not None:
                return self.runner(self, args, kwargs)
            if self.replaced is None:
                return type(self.module).forward(self.module, *args, **kwargs)
            return self.replaced(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            better = mismatch(self, error)
            if better is None:
                raise
            raise better from error

    def is_simple(self) -> bool:
        """Nothing stands between this and the forward of the module's class."""
        return self.runner is None and self.replaced is None and self.replica is None

    def tree(self) -> list[Forward]:
        """The Forwards of this module's subtree that belong to this wrapped model, in registration order."""
        found = self._forwards
        if found is None:
            found = []
            for module in self.module.modules():
                own = forward_of(module)
                if isinstance(own, Forward) and own.shared is self.shared:
                    found.append(own if own.module is module else own.move_to(module))
            self._forwards = found
        return found

    def census(self) -> Census:
        """The modules of `tree` as they were when last looked at; not for dynamo, which makes no sets of them."""
        census = self._census
        if census is None:
            census = self._census = Census(self.tree())
        return census

    def move_to(self, module: nn.Module) -> Forward:
        """Give a shallow copy of this module a Forward of its own."""
        mine = object.__new__(type(self))
        mine.__dict__.update(self.__getstate__(), module=module)
        module.__dict__["forward"] = mine
        return mine

    def forget_tree(self) -> None:
        """The subtree has changed."""
        self._forwards = self._census = None

    def take_up(self) -> None:
        """Take up, or refuse, now what changed in the model since its last forward."""
        self._check(in_backward=True)

    def _check(self, in_backward: bool) -> None:
        """Take up, or refuse, what changed in the model since the last forward."""
        shared = self.shared
        if shared.root is None and self.name == "":
            shared.root = weakref.ref(self.module)
            if shared.converted is not None:
                shared.converted.regrade(shared.named_parameters())
        census = self.census()
        if census.is_sharded_otherwise():
            changed = next(f for f in census.forwards if (MARK in f.module.__dict__) is (f.managed is None))
            raise ModelChangedError(sharded_since(changed))
        if not census.all_stored() and shared.mixed:
            for forward in census.forwards:
                for key, param in forward.module._parameters.items():
                    if param is not None and key not in (forward.managed or ()):
                        check_stored(forward, key, param)
        if census.is_stale() or census.device() not in (None, shared.device):
            shared.refresh(self)
        for owner in shared.owners:
            owner.owned()  # Buckets are made anew for parameters that `add_param_group` brought since.
        if shared.scaler is not None and not in_backward and is_grad_enabled():
            warn_of_hooks(self)
            check_backwards(shared, shared.scaler)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forwards": None, "_census": None, "buckets": {}}
