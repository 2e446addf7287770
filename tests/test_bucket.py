"""What a bucket remembers between backward and the step, and when it forgets."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from wrapprec.bucket import Bucket

CPU = torch.device("cpu")


class Owner:
    """Stands for an optimizer."""


def arrive(bucket: Bucket, params: list[nn.Parameter], bad: bool) -> torch.Tensor:
    """Let a backward bring gradients of `params`."""
    seen = torch.zeros(())

    class Arrive(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
            return torch.ones(())

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            bucket.record([torch.tensor(float(bad))], list(params), seen)
            return tuple(torch.ones_like(p) for p in params)

    Arrive.apply(*params).backward()
    return seen


def two() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))


def test_an_overflow_is_remembered_until_its_owner_has_stepped() -> None:
    owner, (a, b) = Owner(), two()
    bucket = Bucket((owner,), False, CPU)
    seen = arrive(bucket, [a, b], bad=True)
    assert bucket.counts_for(owner) and bucket.found == 1 and seen == 1
    bucket.consume(owner)
    assert not bucket.counts_for(owner) and bucket.found == 0


def test_every_owner_has_to_step_before_a_record_goes() -> None:
    first, second, (a, b) = Owner(), Owner(), two()
    bucket = Bucket((first, second), False, CPU)
    arrive(bucket, [a, b], bad=True)
    bucket.consume(first)
    assert not bucket.counts_for(first) and bucket.counts_for(second) and bucket.found == 1
    bucket.consume(second)
    assert not bucket.pending


def test_gradients_that_are_accumulated_keep_an_earlier_overflow() -> None:
    owner, (a, b) = Owner(), two()
    bucket = Bucket((owner,), False, CPU)
    arrive(bucket, [a, b], bad=True)
    arrive(bucket, [a, b], bad=False)
    assert bucket.found == 1


def test_gradients_that_arrive_where_none_are_start_afresh() -> None:
    owner, (a, b) = Owner(), two()
    bucket = Bucket((owner,), False, CPU)
    arrive(bucket, [a, b], bad=True)
    a.grad = b.grad = None
    assert not bucket.counts_for(owner)
    arrive(bucket, [a, b], bad=False)
    assert bucket.counts_for(owner) and bucket.found == 0


def test_a_second_loss_over_other_parameters_does_not_wipe_the_first_ones_overflow() -> None:
    owner, (a, b) = Owner(), two()
    bucket = Bucket((owner,), False, CPU)
    arrive(bucket, [a], bad=True)
    assert b.grad is None
    arrive(bucket, [b], bad=False)
    assert bucket.found == 1


def test_a_change_that_no_patched_step_made_is_noticed() -> None:
    owner, (a, b) = Owner(), two()
    bucket = Bucket((owner,), False, CPU)
    arrive(bucket, [a, b], bad=False)
    assert not bucket.changed()
    with torch.no_grad():
        a.add_(1)
    assert bucket.changed()
    bucket.watch({id(b)})
    assert bucket.changed()
    bucket.watch({id(a)})
    assert not bucket.changed()


def test_a_copied_bucket_has_no_owner_and_no_record() -> None:
    owner, (a, b) = Owner(), two()
    bucket = Bucket((owner,), True, CPU)
    arrive(bucket, [a, b], bad=True)
    twin = copy.deepcopy(bucket)
    assert twin.owners == () and not twin.pending and twin.found == 0 and twin.multi_tensor
    assert bucket.found == 1
