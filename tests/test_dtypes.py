"""The names of dtypes and formats."""

from __future__ import annotations

import pytest
import torch

from wrapprec import dtypes
from wrapprec.dtypes import COMPUTE_FORMATS, LOW, MIXABLE, WEIGHT_FORMATS, is_format, is_low, parse_dtype
from wrapprec.errors import PolicyError

SPELLINGS = {
    torch.float32: "float32 f32 fp32 32 torch.float32 FLOAT32",
    torch.float16: "float16 f16 fp16 half 16 torch.float16 Half",
    torch.bfloat16: "bfloat16 bf16 torch.bfloat16 BF16",
    torch.float64: "float64 f64 fp64 double torch.float64",
}


@pytest.mark.parametrize(("dtype", "spelling"), [(d, s) for d, many in SPELLINGS.items() for s in many.split()])
def test_every_spelling_means_its_dtype(dtype: torch.dtype, spelling: str) -> None:
    assert parse_dtype(spelling) is dtype


@pytest.mark.parametrize("dtype", SPELLINGS)
def test_dtype_parses_to_itself_and_back_from_both_names(dtype: torch.dtype) -> None:
    assert parse_dtype(dtype) is dtype
    assert parse_dtype(dtypes.name(dtype)) is dtype
    assert parse_dtype(dtypes.short(dtype)) is dtype


@pytest.mark.parametrize("form", WEIGHT_FORMATS + COMPUTE_FORMATS)
def test_formats_stay_strings(form: str) -> None:
    assert parse_dtype(form.upper()) is parse_dtype(form)
    assert parse_dtype(form) == form
    assert is_format(form)
    assert dtypes.name(form) == dtypes.short(form) == form


def test_names_are_those_of_torch_without_the_prefix() -> None:
    assert [dtypes.name(d) for d in SPELLINGS] == ["float32", "float16", "bfloat16", "float64"]
    assert [dtypes.short(d) for d in SPELLINGS] == ["f32", "f16", "bf16", "f64"]


def test_float64_is_never_mixed() -> None:
    assert frozenset({torch.float16, torch.bfloat16}) == LOW
    assert set(MIXABLE - LOW) == {torch.float32}


def test_tf32_is_no_low_precision_because_dtypes_stay() -> None:
    assert [is_low(d) for d in (torch.float16, "fp8", "tf32", torch.float32)] == [True, True, False, False]


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(PolicyError) as caught:
        parse_dtype("bfloat61")
    text = str(caught.value)
    assert text.startswith("Expected a dtype name, one of float32, f32, fp32, 32,")
    assert "Received: 'bfloat61' (of type str)" in text
    assert "did you mean 'bfloat16'?" in text


def test_dtype_that_training_does_not_run_in_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"Received: torch\.int64 \(of type dtype\)"):
        parse_dtype(torch.int64)
