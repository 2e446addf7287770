"""What `torch.distributed.fsdp.fully_shard` does to a model's weights, as far as lending them must know of it.

FSDP keeps a shard of each parameter, a DTensor, in its module. When the module that `fully_shard` was called on is
entered, it puts the whole weight, a leaf in the policy's `param_dtype`, in the shard's place, and takes it away again
afterwards; the leaf's gradient is reduced in backward. So the leaf is what is lent, its gradient is true before it is
reduced, and the shard is what the optimizer, the overflow and the user know it by.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wrapprec.dtypes import LOW

if TYPE_CHECKING:
    from wrapprec.bucket import Bucket

MARK = "_is_fsdp_managed_module"
"""What both forms of FSDP set on every module whose parameters they manage (torch 2.9 and 2.13)."""


def is_distributed_tensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor: without an import of what makes them, which takes long."""
    return type(tensor) is not Tensor and hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    if not is_distributed_tensor(tensor):
        return tensor
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    # One that a collective is still on its way to.
    return part.wait() if hasattr(part, "wait") else part


class Managed:
    """A parameter that FSDP manages; to a bucket it stands for the parameter.

    Args:
        fsdp_param: FSDP's own record of it.
    """

    is_leaf = True

    def __init__(self, fsdp_param: Any) -> None:
        self._of = weakref.ref(fsdp_param)

    @property
    def shard(self) -> Tensor:
        """The parameter that the optimizer knows: a DTensor."""
        shard: Tensor = self._fsdp_param.sharded_param
        return shard

    @property
    def dtype(self) -> torch.dtype:
        """Of the whole weight that forward gets."""
        of = self._fsdp_param
        # FSDP knows it from its first forward on, which is later than ours where no `fully_shard` is around the model.
        known = getattr(of, "param_dtype", None)
        dtype: torch.dtype = known or of.mp_policy.param_dtype or of.sharded_param.dtype
        return dtype

    @property
    def grad(self) -> Tensor | None:
        """The gradient, or what waits to be reduced (`set_requires_gradient_sync(False)`)."""
        of = self._fsdp_param
        for held in (of.sharded_param.grad, of.unsharded_accumulated_grad):
            if held is not None:
                return held  # type: ignore[no-any-return]
        whole = getattr(of, "_unsharded_param", None)
        return None if whole is None else whole.grad

    @property
    def _version(self) -> int:
        version: int = self.shard._version
        return version

    @property
    def _fsdp_param(self) -> Any:
        of = self._of()
        assert of is not None, "FSDP's hooks on the module keep it"
        return of

    def deposit(self, grad: Tensor) -> None:
        """Add a float32 gradient to what FSDP will reduce: the leaf itself could hold it in its own dtype only.

        It would be a true gradient in float16 then, below whose range the loss scale was to keep it from falling.
        """
        of, grad = self._fsdp_param, grad.detach()
        waiting = of.unsharded_accumulated_grad
        of.unsharded_accumulated_grad = grad if waiting is None else waiting.add_(grad)


class Whole:
    """Stands in for the bucket of a parameter that FSDP manages while its whole weight is lent.

    Args:
        bucket: of the parameter.
        managed: the parameter.
    """

    multi_tensor = False

    def __init__(self, bucket: Bucket, managed: Managed) -> None:
        self.bucket = bucket
        self.managed = managed

    def record(self, flags: list[Tensor], params: list[Tensor], seen: Tensor, running: Container[int] = ()) -> None:
        """See `Bucket.record`."""
        self.bucket.record(flags, [self.managed], seen, running)  # type: ignore[list-item]  # has what is asked of one

    def grad_dtype(self, leaf: Tensor) -> torch.dtype:
        """See `Bucket.grad_dtype`."""
        return torch.float32 if leaf.dtype in LOW else leaf.dtype

    def deliver(self, leaf: Tensor, grad: Tensor) -> Tensor | None:
        """See `Bucket.deliver`."""
        if grad.dtype is leaf.dtype:
            return grad
        self.managed.deposit(grad)
        return None


Table = dict[int, dict[str, Managed]]
"""By the id of a module: its managed parameters by name."""


def states_below(model: nn.Module) -> list[Any]:
    """What `fully_shard` has attached to the modules of a model: one a call; empty where it was never imported."""
    api = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    if api is None:
        return []
    found = {id(state): state for state in map(api._get_module_fsdp_state, model.modules()) if state is not None}
    return list(found.values())


def groups_of(state: Any) -> list[Any]:
    """The groups of parameters that one call of `fully_shard` manages; torch 2.9 has at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def managed_below(model: nn.Module) -> Table:
    """The parameters that FSDP manages, by module and name; a tied one is the same under all its names."""
    table: Table = {}
    for state in states_below(model):
        for group in groups_of(state):
            for fsdp_param in group.fsdp_params:
                managed, info = Managed(fsdp_param), fsdp_param._module_info
                table.setdefault(id(info.module), {})[info.param_name] = managed
                for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
                    table.setdefault(id(module), {})[name] = managed
    return table
