"""How a device reads the bits of a number, and where its random bits come from: torch's own ways, or others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Bits:
    """What rounding asks of a backend.

    Attributes:
        in_pieces: whether long tensors are worked through piece by piece: what is made on the way fits into a cache.
    """

    in_pieces: bool = True

    def read_bits(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Read a tensor's bits as another dtype of the same size.

        Args:
            tensor: of any dtype.
            dtype: of as many bytes.

        Returns:
            The same bits; where the device has views of them, the same storage.
        """
        return tensor.view(dtype)

    def generator(self, device: torch.device) -> Any:
        """Make a source of random bits that is nobody else's.

        Args:
            device: a device of this type.

        Returns:
            torch's, of the host where the device has none; or a `Counted`.
        """
        try:
            return torch.Generator(device)
        except RuntimeError:
            return torch.Generator()
