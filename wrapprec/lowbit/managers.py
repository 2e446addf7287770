"""Who else holds on to a model's parameters, so that they cannot be converted, or not rounded: DDP, FSDP, DTensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from wrapprec.dtypes import LOW, name
from wrapprec.errors import PolicyError, WrapprecError, message, module_label
from wrapprec.ranks import alive, is_distributed
from wrapprec.sharded import is_distributed_tensor

_USE_MIXED = (
    'use a mixed policy, with fully_shard(module, mp_policy=wrapprec.fsdp_policy("bf16-mixed")): weights are sent in'
    " bfloat16, and the float32 shards take no more than bfloat16 ones with what they would lose"
)


def reducers_of(ids: set[int]) -> list[DDP]:
    """The DistributedDataParallel modules that reduce the gradients of some of these parameters."""
    if not ids or not is_distributed():
        return []
    return [ddp for ddp in alive(DDP) if any(id(param) in ids for param in ddp.parameters())]


def check_managers(model: nn.Module, changing: list[tuple[str, Tensor, torch.dtype]]) -> None:
    """Refuse to convert what others hold on to: DDP the gradients' hooks, FSDP and DTensors the storage.

    Args:
        model: the root.
        changing: the parameters' names, themselves, and the dtypes that they are to have.

    Raises:
        PolicyError: FSDP manages parameters, or they are DTensors.
        WrapprecError: there is a DDP around them.
    """
    if not changing:
        return
    doubles = all(dtype is torch.float64 for *_, dtype in changing)
    remedy = "call model.double() before the weights are distributed" if doubles else _USE_MIXED
    for fqn, module in model.named_modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise PolicyError(
                message(
                    "parameters that nobody else manages, to change their dtype",
                    "a model that fully_shard was applied to",
                    where=module_label(fqn, module),
                    remedy=remedy,
                )
            )
    for fqn, param, _ in changing:
        if is_distributed_tensor(param):
            wanted = "parameters that are plain tensors, to change their dtype"
            raise PolicyError(message(wanted, _shown(param), where=repr(fqn), remedy=remedy))
    if reducers_of({id(param) for _, param, _ in changing}):
        raise WrapprecError(
            message(
                "wrap before DistributedDataParallel, where the parameters change their dtype",
                "parameters whose gradients a DistributedDataParallel reduces already, which would stop",
                remedy="call wrap(model, ...) first, then DistributedDataParallel(model)",
            )
        )


def check_rounded(params: Iterable[tuple[str, Tensor, torch.dtype]], rounding: str | None) -> None:
    """Refuse to round a DTensor: no stand-in can be shown to an optimizer in its place.

    Args:
        params: their names, themselves, and the dtypes that they are stored in.
        rounding: of the plan.

    Raises:
        PolicyError: a parameter that is trained in low precision is one.
    """
    for fqn, param, dtype in params:
        if rounding is not None and dtype in LOW and param.requires_grad and is_distributed_tensor(param):
            wanted = f"parameters that are plain tensors, to keep what {name(dtype)} loses of their updates"
            raise PolicyError(message(wanted, _shown(param), where=repr(fqn), remedy=_USE_MIXED))


def check_stored(form: str, weight: Tensor, where: str) -> None:
    """Refuse to store a DTensor in a weight format, whose kernels know no DTensors.

    Args:
        form: the format.
        weight: to be stored in it.
        where: what its module is called.

    Raises:
        PolicyError: it is one.
    """
    if is_distributed_tensor(weight):
        remedy = (
            "use bf16-mixed, under which fully_shard sends frozen weights in bfloat16; or call wrap first, then"
            " DistributedDataParallel(model)"
        )
        wanted = f"weights that are plain tensors, to store as {form}"
        raise PolicyError(message(wanted, _shown(weight), where=where, remedy=remedy))


def _shown(param: Tensor) -> str:
    return f"a {type(param.data).__name__} of shape {tuple(param.shape)}, as sharding makes them"
