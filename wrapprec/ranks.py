"""What the processes that train one model agree on: whether to skip a step, and the loss scale."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

from wrapprec.errors import WrapprecError, message
from wrapprec.flags import non_finite
from wrapprec.scale import Scaler
from wrapprec.sharded import is_distributed_tensor

if TYPE_CHECKING:
    from wrapprec.state import Shared

_LATER = 3
"""How often a callback at the end of a backward is put off: those that DDP queues from its own must come first."""


class Ranks:
    """The DistributedDataParallel modules that reduce the gradients of one wrapped model.

    They are found below the wrapped model, around it when forward is entered, or, if forward never was, among
    all that there are. Never from what only some ranks did, for ranks that disagree about it would wait for ever.
    """

    def __init__(self) -> None:
        self._ddps: list[weakref.ref[DDP]] = []
        self._searched = False
        self._meshes: list[Any] = []
        # By the id of one of them: the contexts that were made with the configuration it has.
        self._joins: dict[int, tuple[Any, list[weakref.ref[Join]]]] = {}

    @property
    def ddps(self) -> list[DDP]:
        """Those that exist."""
        return [ddp for ddp in (ref() for ref in self._ddps) if ddp is not None]

    def add(self, ddp: DDP) -> None:
        """Take note of one.

        Raises:
            WrapprecError: it casts by itself.
        """
        if any(known is ddp for known in self.ddps):
            return
        if ddp.mixed_precision is not None:
            raise WrapprecError(
                message(
                    "a DistributedDataParallel that leaves precision to wrapprec",
                    f"one with mixed_precision={ddp.mixed_precision}",
                    remedy="leave mixed_precision out of DistributedDataParallel(...)",
                )
            )
        self._ddps = [ref for ref in self._ddps if ref() is not None] + [weakref.ref(ddp)]

    def meet(self) -> None:
        """Take note of the one whose forward is running."""
        around = DDP._active_ddp_module
        if around is not None:
            self.add(around)

    def look_below(self, model: nn.Module) -> None:
        """Take note of those that are parts of `model`, or `model` itself."""
        for module in model.modules():
            if isinstance(module, DDP):
                self.add(module)

    def search(self, ids: set[int]) -> None:
        """Look, once, for those that hold parameters known by `ids`, if none is known so far."""
        if self._searched or self.ddps or self._meshes:
            return
        self._searched = True
        for ddp in alive(DDP):
            if any(id(param) in ids for param in ddp.parameters()):
                self.add(ddp)

    def see(self, param: Tensor) -> None:
        """Take note of the mesh of processes that a parameter is spread over, if it is a DTensor."""
        if is_distributed_tensor(param):
            mesh = param.device_mesh  # type: ignore[attr-defined]
            if all(mesh is not known for known in self._meshes):
                self._meshes.append(mesh)

    def groups(self) -> list[Any]:
        """The process groups of more than one process: of a mesh, one for each of its dimensions, in their order.

        In the same order on every rank, for they wait in each: ranks may have met the DDPs in different ones.
        """
        groups = {id(group): group for group in sorted((ddp.process_group for ddp in self.ddps), key=_name_of)}
        for mesh in self._meshes:
            groups |= {id(group): group for group in mesh.get_all_groups()}
        return [group for group in groups.values() if dist.get_world_size(group) > 1]

    @property
    def joining(self) -> bool:
        """Inside ``with ddp.join()``, where ranks that ran out of inputs answer to DDP's own collectives only."""
        return bool(self._ddps) and any(self._is_joining(ddp) for ddp in self.ddps)

    def _is_joining(self, ddp: DDP) -> bool:
        # The configuration stays when the context is left, and is another one in the next.
        config = ddp._join_config
        if not config.enable:
            return False
        known, contexts = self._joins.get(id(ddp), (None, []))
        if known is not config:
            made = [join for join in alive(Join) if any(one is ddp for one in join._joinables)]
            contexts = [weakref.ref(join) for join in made]
            self._joins[id(ddp)] = config, contexts
        return any(context() is not None for context in contexts)

    def reduces(self) -> bool:
        """The backward that is running or was run last reduces gradients: it is not under ``no_sync``."""
        return all(ddp.require_backward_grad_sync for ddp in self.ddps)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model is in no DistributedDataParallel yet.
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # restores exactly what __init__ sets


def _name_of(group: Any) -> str:
    name: str = group.group_name
    return name


def alive(kind: type) -> list[Any]:
    """All objects of a class that the garbage collector knows."""
    # `isinstance` would wake up proxies.
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]


def is_distributed() -> bool:
    """There are other processes to agree with."""
    return dist.is_available() and dist.is_initialized()


def agree(members: Iterable[tuple[Ranks, Scaler, set[int]]], numbers: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """Take, on every rank, the largest of what the ranks found, and one loss scale.

    One small all-reduce a process group, which the host does not wait for where the device does the work.

    Args:
        members: by model, its ranks, its loss scale and the ids of its parameters: as many on every rank.
        numbers: float32, of one dimension, as long on every rank.

    Returns:
        The largest of each number, and, by the id of a scale, 1.0 where some rank had a backward that it has not been
        updated for: float32, shape ().
    """
    touched: dict[int, Tensor] = {}
    groups: dict[int, tuple[Any, list[Scaler]]] = {}
    for ranks, scaler, ids in members:
        ranks.search(ids)
        for group in () if ranks.joining else ranks.groups():
            groups.setdefault(id(group), (group, []))[1].append(scaler)
    for group, scalers in groups.values():
        standing = [scaler.standing(touched.get(id(scaler))).to(numbers.device) for scaler in scalers]
        both = torch.cat([numbers, *standing])
        dist.all_reduce(both, dist.ReduceOp.MAX, group)
        numbers, *standing = both.split([len(numbers), *(len(one) for one in standing)])
        for scaler, one in zip(scalers, standing, strict=True):
            touched[id(scaler)] = scaler.stand_at(one.to(scaler.device))
    return numbers, touched


def take_reduced(shared: Shared) -> None:
    """Judge by the gradients that were reduced, which are the same on all ranks, and not by what this rank saw.

    Where other collectives than DDP's own would not be answered, that is how those ranks agree which still run.
    """
    scaler = shared.scaler
    if scaler is None or not shared.ranks.reduces():
        return
    found = non_finite([p.grad for p in shared.parameters() if p.grad is not None], scaler.device)
    for bucket in shared.pending():
        assert bucket.found is not None
        bucket.found.copy_(found)
    scaler.seen.copy_(found)


def at_end_of_backward(function: Callable[[], None], after: int = _LATER) -> None:
    """Run `function` when the running backward has ended, and DDP has written the reduced gradients."""
    if after == 0:
        function()
        return
    Variable._execution_engine.queue_callback(lambda: at_end_of_backward(function, after - 1))
