"""Lends the weights that FSDP gathers: each time it puts a whole weight into its module, that is what is lent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wrapprec.boundary import Lend
from wrapprec.checks import check_weights, version_of
from wrapprec.dtypes import MIXABLE
from wrapprec.errors import CaptureError, message, module_label
from wrapprec.lent import Brought, joining
from wrapprec.sharded import Managed, Whole

if TYPE_CHECKING:
    from wrapprec.forward import Forward
    from wrapprec.scope import Scope


def lend_dtype(forward: Forward, given: torch.dtype) -> torch.dtype:
    """In which dtype a weight is lent that FSDP gathers in the dtype `given`.

    FSDP has one dtype for a whole block: a norm in it computes in float32 all the same.
    """
    if forward.region is None or forward.region.low is None:
        return torch.float32
    return forward.lend_dtype or given


def refuse_compiled(where: str) -> None:
    """Raise the error for a sharded model that is compiled under a loss scale."""
    raise CaptureError(
        message(
            "a model that is sharded by FSDP to run eagerly, where a loss scale is on",
            "torch.compile of it, or of a part of it",
            where=where,
            remedy="use a bf16 policy, which needs no loss scale and can be compiled, or leave torch.compile out",
        )
    )


# See `capture.refuse_scale`.
refuse_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_not_compiled(model: nn.Module) -> None:
    """See `refuse_compiled`, for what was compiled before it was wrapped."""
    for fqn, module in model.named_modules():
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            refuse_compiled(module_label(fqn, module))


def bring(scope: Scope, forward: Forward, key: str, managed: Managed, cast: bool) -> dict[str, Brought]:
    """Lend what FSDP will put in the place of a parameter; nothing where it can be used as it is.

    Each weight crosses the border by itself: those that are lent together must be there at the same time.

    Args:
        scope: the one that opens.
        forward: of the module that has the parameter.
        key: its name there.
        managed: the parameter.
        cast: False for one that hooks compute a weight from: the result is cast.
    """
    given = managed.dtype
    if given not in MIXABLE:
        return {}
    wanted = lend_dtype(forward, given) if cast else given
    if wanted is given and (scope.border is None or not managed.shard.requires_grad):
        return {}
    versions: list[int] = []

    def make(found: Tensor) -> Tensor:
        if found is managed.shard:
            return found
        dtype = wanted if wanted is not found.dtype else None
        with scope.modes.restore(), joining:
            if scope.border is not None and scope._differentiates(found):
                bucket = scope.shared.bucket_of(forward, key, forward.tree())
                lent: Tensor = Lend.apply(scope.border, Whole(bucket, managed), (dtype,), found)[0]
            else:
                lent = found if dtype is None else found.to(dtype)
        versions[:] = [] if dtype is None else [version_of(lent)]
        if scope.shared.diagnosis is not None:
            scope.shared.diagnosis.watch_weight(forward.name, key, lent)
        return lent

    def check(lent: Tensor) -> None:
        check_weights((forward, key, lent, version) for version in versions)

    return {key: Brought(make, check)}
