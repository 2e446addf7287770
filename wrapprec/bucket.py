"""A group of parameters that are lent together, and the overflow that backward saw in their gradients."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from wrapprec.dtypes import LOW
from wrapprec.flags import scalar
from wrapprec.sharded import local

_recording = threading.RLock()
"""Held for a record: backwards on several threads, and one backward's threads for several devices, may meet in it."""

Owner = Any
"""Whoever steps a parameter: compared by identity."""


class Bucket:
    """The parameters that are lent by one autograd Function, so that their gradients come back together.

    All parameters of a bucket have the same owners (optimizers): one optimizer's overflow never skips another's step.

    Args:
        owners: who steps these parameters; empty when no patched step does.
        multi_tensor: cast all weights in one pass (many kernel launches become few) or one by one.
        device: where the overflow flag lives; None for a model without a loss scale.
    """

    def __init__(self, owners: tuple[Owner, ...], multi_tensor: bool, device: torch.device | None) -> None:
        # A graph that a module keeps (an auxiliary loss) holds the bucket: through its owners it would hold the model,
        # in a cycle that the garbage collector does not see.
        self._owners = tuple(weakref.ref(owner) for owner in owners)
        self.multi_tensor = multi_tensor
        # 1.0 when backward saw inf or nan. One tensor for the bucket's life: compiled graphs write it in place.
        self.found = None if device is None else torch.zeros((), dtype=torch.float32, device=device)
        self.pending = False
        self._reset()

    def _reset(self) -> None:
        self.tasks: set[int] = set()
        # A gradient as the last backward left it.
        self.left: tuple[int, int] | None = None
        self.params: list[Tensor] = []
        self.versions: list[int] = []
        self.consumed: set[int] = set()

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Who steps these parameters, of those that are left."""
        return tuple(owner for owner in (ref() for ref in self._owners) if owner is not None)

    def forget(self) -> None:
        """Nothing is recorded: gradients were zeroed, or every owner has stepped."""
        if self.pending and self.found is not None:
            self.found.zero_()
        self.pending = False
        self._reset()

    def record(self, flags: list[Tensor], params: list[Tensor], seen: Tensor, running: Container[int] = ()) -> None:
        """Keep what backward saw in the gradients of `params`, for the step and, in `seen`, for the scale.

        Gradients that arrive where none are (``p.grad is None``) start afresh: the user dropped the earlier ones. So do
        those that arrive where all are zero, if somebody wrote into them since the last backward. Two arrivals within
        one backward belong together, since autograd accumulates only after the last; and so do those of backwards that
        run at the same time.

        Args:
            flags: 1.0 where there was inf or nan.
            params: whose gradients came.
            seen: of the scale.
            running: the graph tasks of the backwards that have not ended.
        """
        with _recording:
            self._record(flags, params, seen, running)

    def _record(self, flags: list[Tensor], params: list[Tensor], seen: Tensor, running: Container[int]) -> None:
        assert self.found is not None
        task = torch._C._current_graph_task_id()
        leaves = [p for p in params if p.is_leaf]
        # All that the bucket knows of: a second loss may reach other parameters of it than the first did.
        concerned = self.params + leaves
        # Another thread's backward, or the one around this, may have yet to accumulate.
        waiting = any(other in running for other in self.tasks)
        if task not in self.tasks:
            if not waiting and concerned and all(p.grad is None for p in concerned):
                self.forget()
            if not waiting and self.pending and self.left is not None and self.left != self._first_gradient():
                self.found.mul_(_not_all_zero(self.params, self.found.device))
            if task != -1:
                Variable._execution_engine.queue_callback(self._leave_backward)
        self.tasks = {other for other in self.tasks if other in running} | {task}
        self.pending = True
        for flag in flags:
            here = scalar(flag, self.found)
            torch.maximum(self.found, here, out=self.found)
            torch.maximum(seen, here, out=seen)
        known = {id(p) for p in self.params}
        fresh = [p for p in leaves if id(p) not in known]
        self.params += fresh
        self.versions += [p._version for p in fresh]

    def grad_dtype(self, leaf: Tensor) -> torch.dtype:
        """In which dtype the true gradient of a parameter is given back."""
        if leaf.dtype not in LOW or not leaf.is_leaf:
            return leaf.dtype
        return getattr(leaf, "grad_dtype", None) or leaf.dtype  # torch 2.10 lets a parameter's differ from its own

    def deliver(self, leaf: Tensor, grad: Tensor) -> Tensor | None:
        """Take a true gradient of that dtype; returns what autograd is to accumulate."""
        return grad

    def _leave_backward(self) -> None:
        self.left = self._first_gradient()

    def _first_gradient(self) -> tuple[int, int] | None:
        """A gradient and its version: whoever zeroes them by hand changes this one too."""
        grad = next((p.grad for p in self.params if p.grad is not None), None)
        return None if grad is None else (id(grad), grad._version)

    def watch(self, ids: set[int]) -> None:
        """A patched step has changed the parameters known by `ids`: remember their versions anew.

        A change that no patched step made would be an overflow that nobody saw.
        """
        for i, param in enumerate(self.params):
            if id(getattr(param, "shard", param)) in ids:
                self.versions[i] = param._version

    def changed(self) -> bool:
        """A parameter was changed in place, and not by a patched step, since its gradient came."""
        return any(p._version != v for p, v in zip(self.params, self.versions, strict=True))

    @property
    def dropped(self) -> bool:
        """All gradients that the record is about are gone: ``p.grad`` is None."""
        return bool(self.params) and all(p.grad is None for p in self.params)

    def counts_for(self, owner: Owner) -> bool:
        """The record still concerns `owner`'s next step."""
        if not self.pending or id(owner) in self.consumed or all(o is not owner for o in self.owners):
            return False
        return not self.dropped

    def consume(self, owner: Owner) -> None:
        """`owner` has stepped or zeroed its gradients; the record goes when every owner has."""
        self.consumed.add(id(owner))
        if all(id(o) in self.consumed for o in self.owners):
            self.forget()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no optimizer yet, and no gradients.
        return {"multi_tensor": self.multi_tensor, "device": None if self.found is None else self.found.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__((), **state)  # type: ignore[misc]  # restores exactly what __init__ sets


def has_hooks(param: Tensor) -> bool:
    """Whether somebody waits for this very parameter's gradient.

    Autograd calls such hooks for every input of a Function that it reaches, also where no gradient came: for a weight
    that was lent together with others and is not used, they would be given None.
    """
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def _not_all_zero(params: list[Tensor], device: torch.device) -> Tensor:
    """1.0 unless every gradient is zero: float32, shape (), on `device`; nothing is read on the host."""
    grads = [local(p.grad) for p in params if p.grad is not None]
    if any(grad.layout is not torch.strided for grad in grads):
        return torch.ones((), dtype=torch.float32, device=device)
    with torch.no_grad():
        return torch.stack(
            [(norm != 0).to(device, torch.float32) for norm in torch._foreach_norm(grads, torch.inf)]
        ).amax()
