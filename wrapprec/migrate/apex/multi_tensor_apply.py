"""`multi_tensor_applier`, which many scripts import and few use: it says that there are no kernels of Apex."""

from __future__ import annotations

from typing import Any

from wrapprec.migrate.apex.notes import refuse

__all__ = ["MultiTensorApply", "multi_tensor_applier"]


class MultiTensorApply:
    """Apex's launcher of kernels on lists of tensors; not available.

    Args:
        chunk_size: not read.
    """

    available = False

    def __init__(self, chunk_size: int = 2048 * 32) -> None:
        self.chunk_size = chunk_size

    def __call__(self, op: Any, *args: Any) -> Any:
        raise refuse("multi_tensor_apply", f"a call with {op!r}", "use torch._foreach_... functions")


multi_tensor_applier = MultiTensorApply()
