"""Splitting float32 into a 16-bit weight and a remainder loses nothing, and rounding by chance is right on average."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wrapprec.lowbit.words import combine, round_by_chance, split

BF16, F16 = torch.bfloat16, torch.float16
both = pytest.mark.parametrize("dtype", [BF16, F16])


def bits(tensor: Tensor) -> list[int]:
    """What the numbers are, to the last bit."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).tolist()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_every_float32_comes_back_from_bfloat16_and_remainder(words: list[int]) -> None:
    wide = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    wide = wide[~wide.isnan()]
    assert bits(combine(*split(wide, BF16))) == bits(wide)


@given(st.lists(st.floats(2.0**-14, 65504, width=32), min_size=1, max_size=50), st.booleans())
def test_every_number_in_the_normal_range_of_float16_comes_back(numbers: list[float], negative: bool) -> None:
    wide = torch.tensor(numbers) * (-1 if negative else 1)
    assert bits(combine(*split(wide, F16))) == bits(wide)


def test_below_the_normal_range_of_float16_the_remainder_is_absolute() -> None:
    wide = torch.randn(10_000, generator=generator()) * 2.0**-18
    # A unit of the remainder is 2**-15 of the least float16, 2**-24, and half a one may be lost.
    assert (combine(*split(wide, F16)) - wide).abs().max() <= 2.0**-40


def test_weight_is_the_nearest_bfloat16_by_numpy() -> None:
    wide = torch.randn(10_000, generator=generator())
    low, _ = split(wide, BF16)
    below = torch.from_numpy((wide.numpy().view(numpy.uint32) & 0xFFFF0000).view(numpy.float32))
    above = torch.from_numpy(((wide.numpy().view(numpy.uint32) & 0xFFFF0000) + 0x10000).view(numpy.float32))
    nearest = torch.where((wide - below).abs() < (above - wide).abs(), below, above)
    assert torch.equal(low.float(), nearest)


@both
def test_weight_is_what_torch_rounds_to_but_for_ties(dtype: torch.dtype) -> None:
    wide = torch.randn(10_000, generator=generator())
    low, _ = split(wide, dtype)
    cast = wide.to(dtype)
    assert torch.equal(low, cast) or torch.equal((low.float() - wide).abs(), (cast.float() - wide).abs())


@both
def test_inf_and_nan_stay(dtype: torch.dtype) -> None:
    wide = torch.tensor([math.inf, -math.inf, math.nan])
    wide = torch.cat([wide, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    low, rest = split(wide, dtype)
    assert low[:2].tolist() == [math.inf, -math.inf]
    assert low[2:].isnan().all()
    assert rest.tolist() == [0, 0, 0, 0]
    assert combine(low, rest).isnan().tolist() == [False, False, True, True]


@both
@given(st.integers(-(2**15), 2**15 - 1), st.integers(-(2**15), 2**15 - 1))
def test_stale_remainder_is_worth_half_a_last_place_at_most(dtype: torch.dtype, word: int, rest: int) -> None:
    """Somebody has changed the weight: whatever the old remainder is, the number still rounds to the weight."""
    rest = rest if dtype is BF16 else rest // 2  # what `split` gives: two units of float16's are spare
    low = torch.tensor([word], dtype=torch.int16).view(dtype)
    wide = combine(low, torch.tensor([rest], dtype=torch.int16))
    if not low.isfinite():
        # A number near the top of the range rounds to inf, and may be what was split; nan stays nan.
        assert wide.isnan() == low.isnan()
        return
    ends = [torch.nextafter(low, torch.tensor([end], dtype=dtype)).double() for end in (-math.inf, math.inf)]
    steps = [(end - low.double()).abs() for end in ends if end.isfinite()]
    assert (wide.double() - low.double()).abs() <= max(steps) / 2


@both
@pytest.mark.parametrize("value", [1.001, -1.001, 3.3, 1e-3, -7e-5, 3e-6, -2e-7, 1.3 * 2.0**-24])
def test_chance_of_rounding_up_is_the_remainder(dtype: torch.dtype, value: float) -> None:
    wide = torch.full((40_000,), value)
    rounded = round_by_chance(wide, dtype, generator())
    found = rounded.unique().double()
    true = wide[0].double()
    assert len(found) == 2
    assert found[0] < true < found[1], "to one of the two neighbours"
    assert torch.nextafter(found[0].to(dtype), torch.tensor(math.inf, dtype=dtype)) == found[1].to(dtype)
    chance = (true - found[0]) / (found[1] - found[0])
    # Five standard deviations of a binomial of 40,000.
    off = 5 * math.sqrt(chance * (1 - chance) / 40_000)
    assert abs((rounded.double() == found[1]).double().mean() - chance) < off


def test_subnormal_bfloat16_is_rounded_by_chance_too() -> None:
    wide = torch.full((40_000,), 1.25 * 2.0**-133)  # between the least subnormal and the next
    rounded = round_by_chance(wide, BF16, generator()).double()
    assert set(rounded.unique().tolist()) == {2.0**-133, 2.0**-132}
    assert abs((rounded == 2.0**-132).double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40_000)


@both
def test_what_is_low_precision_already_is_not_moved_by_chance(dtype: torch.dtype) -> None:
    low = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = round_by_chance(low.float(), dtype, generator())
    assert torch.equal(rounded[low.isfinite()], low[low.isfinite()])
    assert torch.equal(rounded.isnan(), low.isnan())
    assert torch.equal(rounded.isinf(), low.isinf())


@both
def test_no_chance_makes_a_finite_number_inf(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    wide = torch.tensor([math.nextafter(most, math.inf) * 1.001, -most * 1.001] * 1000)
    assert wide.isfinite().all()
    assert set(round_by_chance(wide, dtype, generator()).tolist()) == {most, -most}


def test_random_bits_come_from_the_generator_alone() -> None:
    wide = torch.randn(1000, generator=generator())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = round_by_chance(wide, BF16, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, round_by_chance(wide, BF16, generator(1)))
    assert not torch.equal(first, round_by_chance(wide, BF16, generator(2)))


@both
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_shapes_and_strides_do_not_matter(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wide = torch.randn(shape, generator=generator()).transpose(0, -1) if shape else torch.randn(())
    low, rest = split(wide, dtype)
    assert low.shape == rest.shape == wide.shape
    assert torch.equal(combine(low, rest), wide)
    assert round_by_chance(wide, dtype, generator()).shape == wide.shape
