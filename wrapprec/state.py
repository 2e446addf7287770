"""What the modules of one wrapped model share."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from wrapprec.audit import Schedule
from wrapprec.bucket import Bucket
from wrapprec.diagnose import Diagnosis
from wrapprec.lent import originals
from wrapprec.plan import Plan
from wrapprec.scale import Scaler

if TYPE_CHECKING:
    from .backends.base import Backend
    from wrapprec.region import Forward


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked of `wrap`: resolved again when the model changes."""

    policy: Any
    rules: tuple[Any, ...]
    loss_scale: Any


class Shared:
    """The state of one wrapped model, found from any of its modules.

    It refers to no module strongly, so that a deep copy of a submodule does not drag the whole model along; a copy
    has its own scale and no optimizer.
    """

    def __init__(self, root: nn.Module, request: Request, plan: Plan, backend: Backend, device: torch.device) -> None:
        self.request = request
        self.plan = plan
        self.backend = backend
        self.device = device
        self.root: weakref.ref[nn.Module] | None = weakref.ref(root)
        self.scaler: Scaler | None = None
        self.start_scaling()
        self.owners: list[Any] = []
        self.buckets: list[Bucket] = []
        # Those of the partition before, which a graph may still hold, and older ones that recorded something.
        self.retired: list[Bucket] = []
        self.schedule = Schedule()
        self.diagnosis: Diagnosis | None = None
        # Weights cast once, by parameter and dtype, while `handle.frozen()` is on.
        self.frozen: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None = None
        self.warned: set[str] = set()
        self.undo: Any = None
        self.handle: Any = None

    @property
    def mixed(self) -> bool:
        """Some module computes in low precision."""
        return any(p.precision.casting is not None for p in self.plan.placements)

    def start_scaling(self) -> None:
        """Make the loss scale, if the plan wants one and there is none yet."""
        if self.scaler is None and self.plan.loss_scale is not None:
            self.scaler = Scaler(self.plan.loss_scale, self.device)

    def parameters(self) -> Iterator[Tensor]:
        """The model's own parameters."""
        root = None if self.root is None else self.root()
        for module in () if root is None else root.modules():
            yield from (param for param in originals(module).values() if param is not None)

    def owns_any(self, ids: set[int]) -> bool:
        """Whether one of the parameters known by `ids` is the model's."""
        return any(id(param) in ids for param in self.parameters())

    def repartition(self) -> None:
        """Make the buckets anew, because who steps a parameter has changed."""
        root = None if self.root is None else self.root()
        if root is not None:
            self.partition(root.__dict__["forward"].tree())

    def partition(self, tree: list[Forward]) -> None:
        """Assign the parameters below `tree` to buckets: in order, by owner, up to the backend's bucket size."""
        lending = self.backend.lending
        device = None if self.scaler is None else self.scaler.device
        owned = [(owner, owner.owned()) for owner in self.owners if owner.alive]
        open_buckets: dict[tuple[int, ...], tuple[Bucket, int]] = {}
        self.retired = [bucket for bucket in self.retired if bucket.pending] + self.buckets
        self.buckets = []
        for forward in tree:
            forward.buckets = {}
            if lending.bucket_elements == 0:
                open_buckets.clear()
            for name, param in originals(forward.module).items():
                if param is None:
                    continue
                owners = tuple(owner for owner, ids in owned if id(param) in ids)
                key = tuple(id(owner) for owner in owners)
                bucket, size = open_buckets.get(key, (None, 0))
                if bucket is None or size > lending.bucket_elements > 0:
                    bucket, size = Bucket(owners, lending.multi_tensor, device), 0
                    self.buckets.append(bucket)
                forward.buckets[name] = bucket
                open_buckets[key] = bucket, size + _elements(param)

    def pending(self) -> list[Bucket]:
        """The buckets whose gradients came back since they were last stepped or zeroed."""
        return [bucket for bucket in (*self.buckets, *self.retired) if bucket.pending]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owners": [], "buckets": [], "retired": [], **dict.fromkeys(_NOT_COPIED)}


_NOT_COPIED = ("root", "frozen", "diagnosis", "undo", "handle")


def _elements(param: Tensor) -> int:
    return 0 if isinstance(param, UninitializedTensorMixin) else param.numel()
