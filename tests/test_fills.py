"""Numbers past a dtype's range are found in the source of a forward, and in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wrapprec.fills import overfill

F16, BF16 = torch.float16, torch.bfloat16
FAR = -1e20


def module(forward: Callable[..., Any]) -> nn.Module:
    made: nn.Module = type("Made", (nn.Module,), {"forward": forward})()
    return made


def finfo_float32(self: Any, x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, torch.finfo(torch.float32).min)


def finfo_float(self: Any, x: Tensor) -> Tensor:
    lowest = torch.finfo(torch.float).min
    return torch.where(x > 0, x, lowest)


def finfo_of_another(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return x.masked_fill(x > 0, torch.finfo(y.dtype).min)


def finfo_of_another_by_name(self: Any, x: Tensor, y: Tensor) -> Tensor:
    dtype = y.dtype
    lowest = torch.finfo(dtype).min
    x[x > 0] = lowest
    return x


def full_like_another(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(x, torch.finfo(y.dtype).min)


def literal(self: Any, x: Tensor) -> Tensor:
    return x - 1e9 * (x > 0)


def negative_whole_number(self: Any, x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, -1000000)


def negative_power(self: Any, x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, -(2**32) + 1)


def constant_of_the_file(self: Any, x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, FAR)


@pytest.mark.parametrize(
    ("forward", "found", "in_bfloat16"),
    [
        (finfo_float32, "torch.finfo(torch.float32)", True),
        (finfo_float, "torch.finfo(torch.float)", True),
        (finfo_of_another, "torch.finfo(y.dtype) in x", True),
        (finfo_of_another_by_name, "torch.finfo(dtype) in x", True),
        (full_like_another, "torch.finfo(y.dtype) in x", True),
        (literal, "1000000000.0", False),
        (negative_whole_number, "-1000000", False),
        (negative_power, "-2 ** 32", False),
        (constant_of_the_file, "FAR", False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_number_is_found_as_it_is_written(forward: Any, found: str, in_bfloat16: bool) -> None:
    assert overfill(module(forward), F16) == found
    assert overfill(module(forward), BF16) == (found if in_bfloat16 else None)


def own_limit(self: Any, x: Tensor) -> Tensor:
    lowest = torch.finfo(x.dtype).min
    return x.masked_fill(x > 0, lowest)


def own_limit_after_a_cast(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return x.to(y.dtype).masked_fill(x > 0, torch.finfo(y.dtype).min)


def limit_in_float(self: Any, x: Tensor) -> Tensor:
    return x.float().masked_fill(x > 0, torch.finfo(x.dtype).min)


def infinity(self: Any, x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, float("-inf"))


def moderate(self: Any, x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, -1e4) + 60000.0


def sizes(self: Any, x: Tensor) -> Tensor:
    return x[:100000].view(-1, 1000000)


def tiny(self: Any, x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(torch.float32).tiny) + torch.finfo(torch.float32).eps + 1e-9


def default_argument(self: Any, x: Tensor, far: float = 1e9) -> Tensor:
    return x


@pytest.mark.parametrize(
    "forward",
    [
        own_limit,
        own_limit_after_a_cast,
        limit_in_float,
        infinity,
        moderate,
        sizes,
        tiny,
        default_argument,
    ],
    ids=lambda value: value.__name__,
)
def test_what_fits_or_cannot_be_known_is_left_alone(forward: Any) -> None:
    assert overfill(module(forward), F16) is None and overfill(module(forward), BF16) is None


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.mask(x)

    def mask(self, x: Tensor) -> Tensor:
        return helper(x)

    @torch.no_grad()
    def unused(self, x: Tensor) -> Tensor:
        return x - 1e30


class Overrides(Base):
    def mask(self, x: Tensor) -> Tensor:
        return x


class HandsOn(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.mask, x, use_reentrant=False)  # type: ignore[no-any-return]


def helper(x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, -1e9)


def test_methods_and_functions_that_forward_calls_are_followed_and_others_are_not() -> None:
    assert overfill(Base(), F16) == "1000000000.0"
    assert overfill(Overrides(), F16) is None


def test_methods_that_forward_hands_to_a_checkpoint_are_followed() -> None:
    assert overfill(HandsOn(), F16) == "1000000000.0" and overfill(HandsOn(), BF16) is None


def recursive(self: Any, x: Tensor) -> Tensor:
    return recursive(self, x) if x.sum() > 0 else x


def test_recursion_ends_and_unreadable_or_missing_source_says_nothing() -> None:
    assert overfill(module(recursive), F16) is None
    space: dict[str, Any] = {}
    exec("def forward(self, x):\n    return x - 1e9", space)  # source that inspect cannot find
    assert overfill(module(space["forward"]), F16) is None
    assert overfill(nn.Module(), F16) is None and overfill(nn.MultiheadAttention(4, 2), F16) is None
