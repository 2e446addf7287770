"""The names of `apex.parallel`: torch's DistributedDataParallel and SyncBatchNorm with Apex's arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from wrapprec.migrate.apex.larc import LARC
from wrapprec.migrate.apex.notes import note, refuse

__all__ = [
    "LARC",
    "DistributedDataParallel",
    "Reducer",
    "SyncBatchNorm",
    "convert_syncbn_model",
    "create_syncbn_process_group",
]


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch's DistributedDataParallel: one process a device, gradients averaged, buffers each rank's own.

    Args:
        module: on its device, before or after `amp.initialize`.
        message_size: elements in one collective.
        delay_allreduce: in Apex also for parameters that a forward does not use: torch then looks for those.
        shared_param: None, as in Apex.
        allreduce_trigger_params: nothing; torch sees by itself which gradients are ready.
        retain_allreduce_buffers: False.
        allreduce_always_fp32: nothing; gradients are float32.
        num_allreduce_streams: nothing.
        allreduce_communicators: None.
        gradient_average: True.
        gradient_predivide_factor: nothing; the average is the same.
        gradient_average_split_factor: None, as in Apex.
        prof: nothing.

    Raises:
        WrapprecError: an argument asks for what torch has no counterpart for.
    """

    def __init__(
        self,
        module: nn.Module,
        message_size: int = 10_000_000,
        delay_allreduce: bool = False,
        shared_param: Any = None,
        allreduce_trigger_params: Any = None,
        retain_allreduce_buffers: bool = False,
        allreduce_always_fp32: bool = False,
        num_allreduce_streams: int = 1,
        allreduce_communicators: Any = None,
        gradient_average: bool = True,
        gradient_predivide_factor: float = 1.0,
        gradient_average_split_factor: Any = None,
        prof: bool = False,
    ) -> None:
        given = locals()
        remedies = {
            "shared_param": "leave it out; shared parameters are found",
            "retain_allreduce_buffers": "read each parameter's .grad",
            "allreduce_communicators": "leave it out, or give torch's own class a process_group",
            "gradient_average": "leave it out, and multiply the loss by the number of processes",
            "gradient_average_split_factor": "use gradient_predivide_factor",
        }
        for name, remedy in remedies.items():
            if given[name] not in ((True,) if name == "gradient_average" else (None, False)):
                raise refuse("parallel.DistributedDataParallel", f"{name}={given[name]!r}", remedy)
        note("apex.parallel.DistributedDataParallel is torch.nn.parallel.DistributedDataParallel")
        # Newer versions of torch have another name for it.
        names = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
        options: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False,
            "bucket_cap_mb": max(1, message_size * 4 // 2**20),
            "find_unused_parameters": bool(delay_allreduce),
        }
        super().__init__(module, **options)

    def enable_allreduce(self) -> None:
        """Average gradients in the next backward."""
        self.require_backward_grad_sync = True

    def disable_allreduce(self) -> None:
        """Keep each rank's own gradients in the next backward: where they accumulate."""
        self.require_backward_grad_sync = False


class Reducer:
    """Averages gradients over the ranks when it is told to.

    Args:
        module_or_grads_list: a model, whose parameters all ranks get from the first; or gradients.
    """

    def __init__(self, module_or_grads_list: Any) -> None:
        self.module = module_or_grads_list if isinstance(module_or_grads_list, nn.Module) else None
        self.grads = [] if self.module is not None else list(module_or_grads_list)
        if self.module is not None:
            for param in self.module.parameters():
                torch.distributed.broadcast(param.data, 0)

    def reduce(self) -> None:
        """Average the gradients that there are. What overflowed on one rank is nan on all, which no clipping hides."""
        grads = self.grads if self.module is None else [p.grad for p in self.module.parameters() if p.grad is not None]
        number = torch.distributed.get_world_size()
        for grad in grads:
            torch.distributed.all_reduce(grad)
            grad.div_(number)
            grad.masked_fill_(grad.isinf(), torch.nan)


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: of the running statistics.
        affine: whether it has parameters.
        track_running_stats: whether it keeps statistics.
        process_group: whose batches are normalised together; None: all.
        channel_last: nothing; torch goes by the memory format.
        fuse_relu: False.

    Raises:
        WrapprecError: with a fused ReLU.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        channel_last: bool = False,
        fuse_relu: bool = False,
    ) -> None:
        if fuse_relu:
            raise refuse("parallel.SyncBatchNorm", "fuse_relu=True", "call torch.relu on what it gives")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, process_group)


def convert_syncbn_model(module: nn.Module, process_group: Any = None, channel_last: bool = False) -> nn.Module:
    """Replace batch normalisation by torch's SyncBatchNorm; call it before `amp.initialize` and the optimizer.

    Args:
        module: the model.
        process_group: whose batches are normalised together; None: all.
        channel_last: nothing; torch goes by the memory format.

    Returns:
        The model; another module where it is itself a batch normalisation.

    >>> type(convert_syncbn_model(nn.Sequential(nn.BatchNorm2d(3)))[0]).__name__
    'SyncBatchNorm'
    """
    found: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    return found


def create_syncbn_process_group(group_size: int) -> Any:
    """Make groups of consecutive ranks, over each of which batches are normalised together.

    Args:
        group_size: ranks in a group; 0: all.

    Returns:
        The group of this rank; None for all.

    Raises:
        ValueError: the number of ranks is no multiple of it.
    """
    if group_size == 0:
        return None
    group, _ = torch.distributed.new_subgroups(group_size)
    return group
