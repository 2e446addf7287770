"""Random bits by counting, for devices where torch has no generators: nothing but integers, and nothing on the host.

Philox 2x32 with 10 rounds: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ALL = 2**32 - 1
_MULTIPLIER, _WEYL, _ROUNDS = 0xD256D193, 0x9E3779B9, 10


def philox(low: Tensor, high: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a counter into random bits.

    Args:
        low: the lower half of the counter: 32 bits in int64, as everything here is.
        high: the upper half.
        key: which of 2**32 sequences it is.

    Returns:
        Two numbers of 32 random bits for each counter.

    >>> zero = torch.tensor(0)
    >>> [hex(bits) for bits in philox(zero, zero, zero)]
    ['0xff1dae59', '0x6cd10df2']
    """
    for _ in range(_ROUNDS):
        product = low * _MULTIPLIER  # of which int64 keeps the 64 bits, as if it had no sign
        # On XLA a shift is a division, which would round a negative number to zero.
        upper = (product & ~_ALL) >> 32 & _ALL
        low, high = upper ^ key ^ high, product & _ALL
        key = key + _WEYL & _ALL
    return low, high


class Counted:
    """A source of random bits whose state is a tensor on the device: the seed, and how often it was drawn from.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self._state = torch.zeros(2, dtype=torch.int64, device=device)

    def manual_seed(self, seed: int) -> None:
        """Start anew.

        Args:
            seed: any integer; its lower 64 bits choose one of 2**32 sequences.
        """
        low, high = torch.tensor(seed & _ALL), torch.tensor(seed >> 32 & _ALL)
        key, _ = philox(low, high, torch.zeros_like(low))
        self._state = torch.stack([key, torch.zeros_like(key)]).to(self._state.device)

    def get_state(self) -> Tensor:
        """The state, int64, of two elements; it can be saved."""
        return self._state.clone()

    def set_state(self, state: Tensor) -> None:
        """Go on from a state, of any device."""
        self._state = state.to(self._state.device, copy=True)

    def draw(self, shape: torch.Size, count: int) -> Tensor:
        """Draw a number below ``2**count`` for each element.

        Args:
            shape: of the result.
            count: how many bits, up to 31.

        Returns:
            int32, on the device.
        """
        seed, drawn = self._state[0], self._state[1]
        index = torch.arange(shape.numel(), dtype=torch.int64, device=self._state.device)
        random, _ = philox(index & _ALL, drawn & _ALL, seed)
        self._state = torch.stack([seed, drawn + 1])
        drawn_now: Tensor = (random & (2**count - 1)).to(torch.int32)
        return drawn_now.reshape(shape)
