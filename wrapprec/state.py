"""What the modules of one wrapped model share."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wrapprec.bucket import Bucket
from wrapprec.diagnose import Diagnosis
from wrapprec.lent import originals
from wrapprec.plan import Plan
from wrapprec.ranks import Ranks
from wrapprec.scale import Scaler
from wrapprec.schedule import Schedule
from wrapprec.standin import forward_of

if TYPE_CHECKING:
    from wrapprec.backends.base import Backend
    from wrapprec.forward import Forward


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
        # The ids of the parameters that the buckets hold.
        self.ids: set[int] = set()
        self.schedule = Schedule()
        # The threads that have trained.
        self.threads: dict[int, weakref.ref[threading.Thread]] = {}
        # By module: the attributes with objects in which tensors that require grad were found.
        self.holders: dict[str, set[str]] = {}
        self.diagnosis: Diagnosis | None = None
        self.be_patient()
        # Weights cast once, by parameter and dtype, while `handle.frozen()` is on.
        self.frozen: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None = None
        # How many such contexts are open, on all threads.
        self.freezers = 0
        self.warned: set[str] = set()
        # What `parametrize.cached()` keeps inside: its cache outside, the scale, and the cache.
        self.cache: Any = None
        # The types of device whose switches for fast float32 products this model has turned on.
        self.hastened: set[str] = set()
        self.ranks = Ranks()
        self.sharded = False  # FSDP manages some of the parameters
        # What is kept beside weights that are stored in other dtypes: a `lowbit.keep.Kept`.
        self.converted: Any = None
        self.undo: Any = None
        self.handle: Any = None
        # Takes up what changed below a Forward; `install` puts it here.
        self.refresh: Any = None

    @property
    def mixed(self) -> bool:
        """Some module computes in low precision."""
        return any(p.precision.casting is not None for p in self.plan.placements)

    @property
    def model(self) -> nn.Module | None:
        """The wrapped model, as long as it lives."""
        return None if self.root is None else self.root()

    def enter_thread(self) -> bool:
        """Note the running thread, and say whether it is the only one alive that trains this model."""
        ident, current = threading.get_ident(), threading.current_thread()
        known = self.threads.get(ident)
        if known is None or known() is not current:
            self.threads[ident] = weakref.ref(current)
        if len(self.threads) == 1:
            return True
        others = [other() for key, other in list(self.threads.items()) if key != ident]
        return not any(other is not None and other.is_alive() for other in others)

    def lendable(self) -> dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None:
        """The weights that were cast once, where they may be lent: never in a graph, whose replays come later."""
        if self.frozen is None or torch.is_grad_enabled() or self.backend.is_recording():
            return None
        return self.frozen

    def be_patient(self) -> None:
        """Stop looking for where inf or nan comes from, unless the first skip at the lowest scale is one too many."""
        config = None if self.scaler is None else self.scaler.config
        at_lowest = config is not None and (not config.dynamic or config.init_scale <= config.min_scale)
        one = config is not None and config.max_consecutive_skips == 1
        self.diagnosis = Diagnosis() if one and at_lowest else None

    def start_scaling(self) -> None:
        """Make the loss scale, if the plan wants one and there is none yet."""
        if self.scaler is None and self.plan.loss_scale is not None:
            self.scaler = Scaler(self.plan.loss_scale, self.device)

    def parameters(self) -> Iterator[Tensor]:
        """The model's own parameters."""
        root = None if self.root is None else self.root()
        for module in () if root is None else root.modules():
            managed = getattr(forward_of(module), "managed", None) or {}
            for name, param in originals(module).items():
                if param is not None:
                    yield managed[name].shard if name in managed else param

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The model's own parameters by qualified name, each once; not those of a model that was wrapped apart."""
        root = None if self.root is None else self.root()
        seen: set[int] = set()
        for fqn, module in () if root is None else root.named_modules():
            forward = forward_of(module)
            if getattr(forward, "shared", None) is self:
                managed = getattr(forward, "managed", None) or {}
                for key, own in originals(module).items():
                    param = managed[key].shard if key in managed else own
                    if param is not None and id(param) not in seen:
                        seen.add(id(param))
                        yield f"{fqn}.{key}".lstrip("."), param

    def trained_by(self, owner: Any) -> bool:
        """Whether `owner` steps one of the model's parameters."""
        return any(other is owner for bucket in self.buckets for other in bucket.owners)

    def repartition(self) -> None:
        """Make the buckets anew, because who steps a parameter has changed."""
        root = None if self.root is None else self.root()
        if root is not None:
            self.partition(forward_of(root).tree())

    def partition(self, tree: list[Forward]) -> None:
        """Assign the parameters below `tree` to buckets: in order, by owner, up to the backend's bucket size."""
        lending = self.backend.lending
        device = None if self.scaler is None else self.scaler.device
        owned = [(owner, owner.owned()) for owner in self.owners if owner.alive]
        open_buckets: dict[tuple[int, ...], tuple[Bucket, int]] = {}
        made: list[Bucket] = []
        known: set[int] = set()
        for forward in tree:
            buckets: dict[str, Bucket] = {}
            if lending.bucket_elements == 0:
                open_buckets.clear()
            for name, param in originals(forward.module).items():
                if param is None:
                    continue
                param = forward.managed[name].shard if forward.managed and name in forward.managed else param
                known.add(id(param))
                self.ranks.see(param)
                owners = tuple(owner for owner, ids in owned if id(param) in ids)
                key = tuple(id(owner) for owner in owners)
                bucket, size = open_buckets.get(key, (None, 0))
                if bucket is None or size > lending.bucket_elements > 0:
                    bucket, size = Bucket(owners, lending.multi_tensor, device), 0
                    made.append(bucket)
                buckets[name] = bucket
                open_buckets[key] = bucket, size + _elements(param)
            # At once: another thread may be lending, or judging a step.
            forward.buckets = buckets
        retired = [bucket for bucket in self.retired if bucket.pending]
        self.retired, self.buckets, self.ids = retired + self.buckets, made, known

    def bucket_of(self, forward: Forward, key: str, tree: list[Forward]) -> Any:
        """The bucket of a parameter of a module of `tree`; what came since the last partition gets one now."""
        if forward.replica is not None:
            origin = forward.replica.origin
            return forward.replica.record(self.bucket_of(origin, key, origin.tree()))
        if key not in forward.buckets:
            root = None if self.root is None else self.root()
            self.partition(tree if root is None else forward_of(root).tree())
            if key not in forward.buckets:
                self.partition(tree)
        return forward.buckets[key]

    def pending(self) -> list[Bucket]:
        """The buckets whose gradients came back since they were last stepped or zeroed.

        What nobody steps is no matter any more, as long as the weights stay as they were, once the gradients were
        dropped or a patched step has answered for the backward (a backbone that only a head is trained on).
        """
        answered = self.scaler is not None and self.scaler.answered
        found = []
        for bucket in (*self.buckets, *self.retired):
            if bucket.pending:
                owned = any(owner.alive for owner in bucket.owners)
                if not owned and (answered or bucket.dropped) and not bucket.changed():
                    if bucket.dropped:
                        bucket.forget()
                    continue
                found.append(bucket)
        return found

    def __getstate__(self) -> dict[str, Any]:
        lists: dict[str, Any] = {"owners": [], "buckets": [], "retired": [], "ids": set(), "threads": {}}
        lists["freezers"] = 0
        return {**self.__dict__, **lists, **dict.fromkeys(_NOT_COPIED)}


_NOT_COPIED = ("root", "frozen", "cache", "diagnosis", "undo", "handle")


def _elements(param: Tensor) -> int:
    return 0 if is_lazy(param) else param.numel()
