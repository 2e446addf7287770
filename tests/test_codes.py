"""State in few bits: each value is rounded to the nearest code of its block, and comes back in the parameter's form."""

from __future__ import annotations

import importlib

import pytest
import torch
from fewbits import BLOCK, around, few_bits, levels, need_torchao  # noqa: F401  one is a fixture of every test
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wrapprec import PolicyError
from wrapprec.lowbit.codes import Low, chance, dequantise, is_low, load_kernels, quantise, size

both = pytest.mark.parametrize("bits", [8, 4])


def nearest(tensor: Tensor, signed: bool) -> Tensor:
    """What rounding to 8 bits has to give, by trying every level, in float64."""
    out, values = [], levels(8, signed).double()
    for block in tensor.reshape(-1).double().split(BLOCK[8]):
        largest = block.abs().max()
        ratio = block / largest if largest > 0 else block
        out.append(values[(ratio[:, None] - values).abs().argmin(1)] * largest)
    return torch.cat(out).view(tensor.shape)


def spread(shape: tuple[int, ...], decades: float, signed: bool, seed: int = 0) -> Tensor:
    """Numbers of very different size, zeros among them."""
    draw = torch.Generator().manual_seed(seed)
    values = 10.0 ** (-decades * torch.rand(shape, generator=draw))
    values[torch.rand(shape, generator=draw) < 0.1] = 0
    return values * torch.randn(shape, generator=draw).sign() if signed else values


@pytest.mark.parametrize("signed", [True, False])
@settings(max_examples=40)
@given(decades=st.floats(0, 9), rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_every_value_becomes_the_nearest_of_256_levels(
    signed: bool, decades: float, rows: int, columns: int, seed: int
) -> None:
    tensor = spread((rows, columns), decades, signed, seed)
    got = dequantise(quantise(tensor, 8, signed), tensor)
    want = nearest(tensor, signed)
    off, least = ((t.double() - tensor).abs() for t in (got, want))
    # bitsandbytes' kernel for CPUs looks up in bins of 2**-15 of the block's largest value, and may take the
    # neighbour where two levels are about as near. Below 2**-9 of the largest the levels lie closer than that.
    largest = torch.cat([b.abs().max().expand(b.numel()) for b in tensor.reshape(-1).split(BLOCK[8])]).view_as(off)
    small = tensor.abs() < 2.0**-9 * largest
    slack = torch.where(small, 1e-6 * tensor.abs() + 1e-9 * largest, 2.0**-15 * largest)
    assert (off <= least + slack).all()


@pytest.mark.parametrize("signed", [True, False])
@settings(max_examples=40)
@given(decades=st.floats(0, 9), rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_every_value_becomes_one_of_the_two_of_16_levels_around_it(
    signed: bool, decades: float, rows: int, columns: int, seed: int
) -> None:
    need_torchao()
    tensor = spread((rows, columns), decades, signed, seed)
    got = dequantise(quantise(tensor, 4, signed, torch.tensor(seed)), tensor).double()
    low, high = around(tensor, signed)
    # Float32 roundings of the ratio and of the product with the scale.
    slack = 1e-6 * tensor.abs().max()
    assert (torch.minimum((got - low).abs(), (got - high).abs()) <= slack).all()


@pytest.mark.parametrize("signed", [True, False])
def test_chance_gives_each_value_on_average_and_the_same_at_the_same_step(signed: bool) -> None:
    """Equal values in many places at one step, and at many steps in one place."""
    need_torchao()
    values = torch.linspace(-0.9, 0.9, 16) if signed else torch.linspace(0.001, 0.9, 16)
    rounds = torch.arange(512)

    def some(numbers: Tensor, step: int) -> Tensor:
        tensor = torch.cat([torch.ones(1), numbers.repeat(4), torch.zeros(63)])
        return dequantise(quantise(tensor, 4, signed, torch.tensor(float(step))), tensor)[1:65].view(4, 16)

    got = torch.stack([some(values, int(step)) for step in rounds])
    assert torch.equal(got[3], some(values, 3))
    # No gap is wider than 0.225, so that a mean of n has a deviation of at most 0.1125 / sqrt(n); five of them.
    for mean, count in ((got.mean((0, 1)), 2048), (got.mean(0), 512)):
        assert ((mean - values.clamp(min=-0.8875)).abs() <= 5 * 0.1125 / count**0.5).all()
    # What is between two levels takes both of them, in one place and at one step.
    low, high = around(torch.cat([torch.ones(1), values]), signed)
    between = (high - low)[1:] > 0
    assert ((got.amax(0) > got.amin(0)).all(0) == between).all()


def test_chance_is_uniform_for_values_that_hardly_differ() -> None:
    for values in (torch.full((65536,), 0.3), torch.arange(65536) * 1e-7, torch.zeros(65536)):
        drawn = chance(values, 0, torch.tensor(7))
        other = chance(values, 0, torch.tensor(8))
        share = torch.histc(drawn, 16, 0, 1) / 65536
        # The deviation of a share of 1/16 is 0.00095; five of them. Neighbours have nothing to do with each other.
        assert (share - 1 / 16).abs().max() < 0.005
        assert torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1].abs() < 0.02
        assert torch.corrcoef(torch.stack([drawn, other]))[0, 1].abs() < 0.02


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_number_is_exact_and_as_large_a_one_of_the_other_sign_is_the_least_level(sign: int) -> None:
    need_torchao()
    tensor = torch.zeros(256)
    tensor[1], tensor[2], tensor[130] = -sign * 0.95, sign, -sign
    got = dequantise(quantise(tensor, 4, True, torch.tensor(3)), tensor)
    want = torch.zeros(256)
    want[1], want[2], want[130] = -sign * 0.8875, sign, -sign
    assert torch.equal(got, want)


@both
def test_zero_stays_zero_beside_large_values(bits: int) -> None:
    tensor = torch.zeros(4096)
    tensor[::256], tensor[1::256] = 1.0, -3.0
    got = dequantise(quantise(tensor, bits, True), tensor)
    assert torch.equal(got == 0, tensor == 0)


@both
def test_second_moment_never_becomes_zero_beside_large_values(bits: int) -> None:
    tensor = torch.full((4096,), 1e-12)
    tensor[::100] = 1.0
    assert (dequantise(quantise(tensor, bits, False), tensor) > 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20])
def test_blocks_of_any_size_keep_their_digits(scale: float) -> None:
    tensor = spread((1000,), 1, True)
    got = dequantise(quantise(tensor * scale, 8, True), tensor)
    # The scale of a block is a float32: it adds one rounding.
    torch.testing.assert_close(got / scale, dequantise(quantise(tensor, 8, True), tensor), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20])
def test_blocks_of_any_size_keep_their_levels(scale: float) -> None:
    need_torchao()
    tensor = spread((1000,), 1, True)
    got = dequantise(quantise(tensor * scale, 4, True), tensor).double() / scale
    low, high = around(tensor, True)
    assert (torch.minimum((got - low).abs(), (got - high).abs()) <= 1e-5).all()  # scales below 1e-38 have fewer digits


@both
@pytest.mark.parametrize("signed", [True, False])
def test_nan_is_not_lost(bits: int, signed: bool) -> None:
    for place in (0, 77, 300):
        tensor = spread((400,), 2, signed)
        tensor[place] = torch.nan
        got = dequantise(quantise(tensor, bits, signed), tensor)
        assert got[place].isnan()
        # The other blocks know nothing of it.
        away = torch.arange(400) // BLOCK[bits] != place // BLOCK[bits]
        assert got[away].isfinite().all()


@both
def test_block_of_zeros_stays_zeros(bits: int) -> None:
    zeros = torch.zeros(300)
    for signed in (True, False):
        assert torch.equal(dequantise(quantise(zeros, bits, signed), zeros), zeros)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_state_comes_back_in_the_form_of_its_parameter(bits: int, dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(spread((5, 7, 3, 3), 2, True).to(dtype, memory_format=torch.channels_last))
    wide = dequantise(quantise(param.float(), bits, True), param)
    assert (wide.dtype, wide.stride()) == (torch.float32, param.stride())
    got = dequantise(quantise(param, bits, True), param)
    assert (got.shape, got.dtype, got.stride(), got.requires_grad) == (param.shape, dtype, param.stride(), False)
    # The widest gap between levels in 4 bits, 0.225 of the block's largest; half of it in 8, 0.007.
    largest = param.detach().abs().max()
    assert (got.double() - param.double()).abs().max() <= (0.23 if bits == 4 else 0.02) * largest


@pytest.mark.parametrize(("bits", "per_value"), [(8, 1 + 4 / 256), (4, 0.5 + 4 / 128)])
def test_bytes_are_those_of_the_codes_and_one_scale_a_block(bits: int, per_value: float) -> None:
    assert size(quantise(torch.ones(8192), bits, True)) == 8192 * per_value


def test_pieces_are_rounded_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    need_torchao()
    tensor = spread((3000,), 3, True)
    whole = quantise(tensor, 4, True, torch.tensor(3))
    monkeypatch.setattr("wrapprec.lowbit.codes._PIECE", 1024)
    pieces = quantise(tensor, 4, True, torch.tensor(3))
    assert torch.equal(whole["codes"], pieces["codes"]) and torch.equal(whole["absmax"], pieces["absmax"])


def test_codes_that_were_cast_to_floats_are_codes_again() -> None:
    tensor = spread((64, 64), 3, True)
    low = quantise(tensor, 8, True)
    cast: Low = {**low, "codes": low["codes"].float()}
    assert is_low(cast) and torch.equal(dequantise(cast, tensor), dequantise(low, tensor))


@pytest.mark.parametrize("other", [{}, {"codes": 1}, torch.ones(3), None, [1], "codes"])
def test_nothing_else_is_taken_for_a_quantised_tensor(other: object) -> None:
    assert not is_low(other)


@pytest.mark.parametrize(
    ("bits", "package", "extra"), [(8, "bitsandbytes", "bitsandbytes"), (4.0, "torchao", "fp8")], ids=["8", "4"]
)
def test_missing_package_is_named_with_its_extra(
    bits: float, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(PolicyError) as caught:
        load_kernels(int(bits))
    text = str(caught.value)
    assert f"Expected {package} to be installed, for optimizer_bits={int(bits)}." in text
    assert text.endswith(f"Remedy: pip install 'wrapprec[{extra}]'")


def test_package_that_does_not_go_with_this_torch_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("cannot import name 'ScalingType' from 'torch.nn.functional'")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(PolicyError) as caught:
        load_kernels(4)
    assert "Received: ImportError: cannot import name 'ScalingType'" in str(caught.value)
    assert f"with a torchao that was made for torch {torch.__version__}" in str(caught.value)
