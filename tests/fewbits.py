"""What the tests of low-bit optimizer state share."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch import Tensor

BLOCK = {8: 256, 4: 128}


def need_torchao() -> None:
    """Skip the test where torchao cannot be imported: a torchao may want a newer torch than wrapprec does."""
    # It calls, while it is imported, what torch has deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchao.optim.subclass_4bit")
        except ImportError as error:
            pytest.skip(f"torchao: {error}")


@pytest.fixture(autouse=True)
def few_bits(request: pytest.FixtureRequest) -> None:
    """Look for torchao where 4 is one of a test's parameters."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and any(value == 4 for value in callspec.params.values() if isinstance(value, int)):
        need_torchao()


def levels(bits: int, signed: bool) -> Tensor:
    """The values that codes stand for, from the packages' own tables."""
    if bits == 4:
        from torchao.optim import subclass_4bit

        return torch.tensor(subclass_4bit.get_qmap_signed() if signed else subclass_4bit.get_qmap_unsigned()) ** (
            1 if signed else 3
        )
    import bitsandbytes

    values = bitsandbytes.functional.create_dynamic_map(signed=signed)
    if not signed:
        values[0] = values[1] / 2
    return values


def around(tensor: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """What rounding to 4 bits may give, by trying every level, in float64: the nearest below, and the nearest above."""
    values = levels(4, signed).double()
    lows, highs = [], []
    for block in tensor.reshape(-1).double().split(BLOCK[4]):
        largest = block[block.abs().argmax()]  # with its sign: it is a level itself
        ratio = (block / largest if largest != 0 else block).clamp(min=values[0])[:, None]
        lows.append(torch.where(values <= ratio + 1e-7, values, -torch.inf).amax(1) * largest)
        highs.append(torch.where(values >= ratio - 1e-7, values, torch.inf).amin(1) * largest)
    one, other = (torch.cat(parts).view(tensor.shape) for parts in (lows, highs))
    return torch.minimum(one, other), torch.maximum(one, other)
