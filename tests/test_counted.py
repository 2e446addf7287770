"""Random bits by counting: the published generator, even bits, and a state that can be saved."""

from __future__ import annotations

import pytest
import torch

from wrapprec.backends.counted import Counted, philox


def source(seed: int) -> Counted:
    made = Counted(torch.device("cpu"))
    made.manual_seed(seed)
    return made


@pytest.mark.parametrize(
    ("low", "high", "key", "expected"),
    [
        (0, 0, 0, (0xFF1DAE59, 0x6CD10DF2)),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_bits_are_those_of_the_authors_known_answers(low: int, high: int, key: int, expected: tuple[int, int]) -> None:
    found = philox(torch.tensor(low), torch.tensor(high), torch.tensor(key))
    assert tuple(int(one) for one in found) == expected


@pytest.mark.parametrize("count", [16, 24])
def test_numbers_are_even_below_their_bound(count: int) -> None:
    drawn = source(3).draw(torch.Size([400, 1000]), count)
    assert drawn.dtype is torch.int32 and drawn.shape == (400, 1000)
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 2**count
    counts = torch.bincount(drawn.flatten() >> (count - 8), minlength=256).double()
    expected = drawn.numel() / 256
    chi = float(((counts - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: mean 255, standard deviation 22.6; five of them on each side.
    assert 255 - 5 * 22.6 < chi < 255 + 5 * 22.6


def test_draws_places_and_seeds_have_nothing_in_common() -> None:
    first = source(1)
    draws = [first.draw(torch.Size([20_000]), 16).double() for _ in range(3)]
    draws += [source(seed).draw(torch.Size([20_000]), 16).double() for seed in (2, 1 + 2**32, -1)]
    draws.append(draws[0].roll(1))
    # Five standard deviations of the correlation of 20,000 independent pairs.
    off = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert off.abs().max() < 5 / 20_000**0.5


def test_state_goes_on_where_it_was_saved() -> None:
    one, other = source(7), source(8)
    one.draw(torch.Size([5]), 16)
    other.set_state(one.get_state())
    expected = one.draw(torch.Size([2, 3]), 16)
    assert torch.equal(other.draw(torch.Size([2, 3]), 16), expected)
    assert not torch.equal(other.draw(torch.Size([2, 3]), 16), expected)


def test_bits_of_the_process_are_not_touched() -> None:
    state = torch.get_rng_state()
    source(0).draw(torch.Size([10]), 16)
    assert torch.equal(torch.get_rng_state(), state)
