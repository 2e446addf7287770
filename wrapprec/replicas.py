"""Runs a replica of nn.DataParallel: a shallow copy whose weights are plain tensors with a graph to the originals.

`torch.nn.parallel.replicate` copies every module without its parameters and sets, as attributes, what a differentiable
broadcast made of those. Such tensors are lent like parameters, and the overflow in their gradients is noted with the
originals. Where the replicas were made inside a scope (nn.DataParallel itself is wrapped), their weights are lent
already, and a replica's call, on a thread of its own, is a part of that scope.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wrapprec.border import Border
from wrapprec.bucket import Bucket
from wrapprec.cast import tensors_in
from wrapprec.lent import FORMER, originals
from wrapprec.outward import borders_below

if TYPE_CHECKING:
    from wrapprec.forward import Forward


class Record:
    """Stands in for a bucket: what backward sees in the gradients of a replica's weights is noted with the originals.

    Args:
        bucket: of the original parameters.
        pairs: the replica's weights and the originals, by the id of the former.
    """

    def __init__(self, bucket: Bucket, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.bucket = bucket
        self.multi_tensor = bucket.multi_tensor
        self.pairs = pairs

    def record(self, flags: list[Tensor], params: list[Tensor], seen: Tensor, running: Container[int] = ()) -> None:
        """See `Bucket.record`."""
        known = [self.pairs.get(id(param), (param, param))[1] for param in params]
        self.bucket.record(flags, known, seen, running)

    def grad_dtype(self, leaf: Tensor) -> torch.dtype:
        """See `Bucket.grad_dtype`."""
        return self.bucket.grad_dtype(leaf)

    def deliver(self, leaf: Tensor, grad: Tensor) -> Tensor | None:
        """See `Bucket.deliver`."""
        return self.bucket.deliver(leaf, grad)


class Replica:
    """What the Forward of one replicated module knows more than others.

    Args:
        origin: the Forward of the module that was replicated.
        module: the replica.
        inside: its weights were lent before they were replicated.
    """

    def __init__(self, origin: Forward, module: nn.Module, inside: bool) -> None:
        self.origin = origin
        self.owns = bool(module.__dict__[FORMER])
        self.params: dict[str, Tensor] = {} if inside else dict(module.__dict__[FORMER])
        self._records: dict[int, Record] = {}

    def record(self, bucket: Bucket) -> Record:
        """The stand-in for one of the original's buckets."""
        if id(bucket) not in self._records:
            own = originals(self.origin.module)
            pairs = {id(copy): (copy, own[key]) for key, copy in self.params.items() if own.get(key) is not None}
            self._records[id(bucket)] = Record(bucket, pairs)
        return self._records[id(bucket)]


def is_replica(module: nn.Module) -> bool:
    """Whether `torch.nn.parallel.replicate` made it."""
    return bool(module.__dict__.get("_is_replica")) and FORMER in module.__dict__


@contextlib.contextmanager
def replicated(origin: Forward, replica: nn.Module, given: Any) -> Iterator[tuple[Forward, Border | None]]:
    """Give every module of a replica a Forward of its own while it is called.

    Not longer: a replica that refers to itself would stay, with its copy of all weights, until the garbage collector
    finds it.

    Args:
        origin: the Forward of the module that was replicated.
        replica: its replica.
        given: the arguments of the call.

    Returns:
        The replica's Forward, and the border of the scope in which the replica was made, if there is one.
    """
    border = _around(origin, replica, given)
    # Made one by one from the originals: the two trees have the same order.
    pairs = [
        (module.__dict__["forward"], copy)
        for module, copy in zip(origin.module.modules(), replica.modules(), strict=True)
        if getattr(module.__dict__.get("forward"), "shared", None) is origin.shared and is_replica(copy)
    ]
    before = [(copy, copy.__dict__.get("forward")) for _, copy in pairs]
    try:
        for own, copy in pairs:
            own.move_to(copy).replica = Replica(own, copy, border is not None)
        yield replica.__dict__["forward"], border
    finally:
        for copy, forward in before:
            mine = copy.__dict__.pop("forward", forward)
            if mine is not forward:
                mine.forget_tree()
            if forward is not None:
                copy.__dict__["forward"] = forward


def _around(origin: Forward, replica: nn.Module, given: Any) -> Border | None:
    """The border that the replica's weights are inside of; where none of them is trained, that its inputs are."""
    scaler = origin.shared.scaler
    if scaler is None or not torch.is_grad_enabled():
        return None
    copies = (copy for module in replica.modules() for copy in module.__dict__.get(FORMER, {}).values())
    trained = next((copy for copy in copies if copy.requires_grad), None)
    for tensor in tensors_in(given) if trained is None else [trained]:
        for border in borders_below(tensor)[0] if tensor.requires_grad else ():
            if border.scaler is scaler:
                return border
    return None
