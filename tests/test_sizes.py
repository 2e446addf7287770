"""Bytes of a weight by format: what is counted is what bitsandbytes keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import wrapprec
from wrapprec.lowbit.sizes import stored_bytes

pytest.importorskip("bitsandbytes")

FORMS = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]


def kept(weight: Any) -> int:
    """The bytes of every storage that a packed weight holds, but the table of 8-bit scales, which all weights share."""
    state = getattr(weight, "quant_state", None)
    held = [weight.data, getattr(weight, "CB", None), getattr(weight, "SCB", None)]
    if state is not None:
        held += [state.absmax, state.code, state.offset, state.state2 and state.state2.absmax]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 64), (40, 48), (5, 7), (129, 33), (300, 256)])
def test_bytes_are_those_that_are_kept(form: str, shape: tuple[int, int]) -> None:
    model = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    with wrapprec.wrap(model, policy=form):
        assert kept(model.weight) == stored_bytes(form, shape)


@pytest.mark.parametrize(("form", "bits"), [("nf4", 4.5), ("fp4", 4.5), ("nf4-dq", 4.127), ("fp4-dq", 4.127)])
def test_large_weights_take_the_bits_of_the_paper(form: str, bits: float) -> None:
    # 4.12695 exactly; the table of 16 values is the rest.
    assert stored_bytes(form, (4096, 4096)) * 8 / 4096**2 == pytest.approx(bits, abs=1e-4)


def test_int8_takes_a_byte_and_a_scale_a_row() -> None:
    assert stored_bytes("int8", (3, 100)) == 312


def test_training_keeps_float32() -> None:
    assert stored_bytes("int8-training", (3, 100)) == 1200
    model = nn.Linear(100, 3)
    with wrapprec.wrap(model, policy="int8-training"):
        assert model.weight.dtype is torch.float32


def test_a_dtype_is_no_weight_format() -> None:
    with pytest.raises(KeyError):
        stored_bytes("float32", (2, 2))
