"""The tables of what runs on an XLA device name what is there, and give one reason for each."""

from __future__ import annotations

import re
from pathlib import Path

import elsewhere
import pytest

HERE = Path(__file__).parent


def test_every_file_is_there_and_named_once() -> None:
    names = " ".join([elsewhere.CORE, *elsewhere.FILES.values()]).split()
    assert len(names) == len(set(names))
    missing = {name for name in names if not (HERE / f"test_{name}.py").exists()}
    assert not missing


def test_every_test_that_is_left_out_is_there_in_a_file_that_is_not() -> None:
    left_out = [name for names in elsewhere.TESTS.values() for name in names.split()]
    assert len(left_out) == len(set(left_out))
    for name in left_out:
        file, _, function = name.partition("::")
        assert file in elsewhere.CORE.split(), name
        assert re.search(rf"^def {function}\(", (HERE / f"test_{file}.py").read_text("utf-8"), re.MULTILINE), name


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Cannot set version_counter for inference tensor"),
            "torch_xla has no linear layers in inference mode",
        ),
        (AssertionError("weight: relative error 8.88e-02"), None),
    ],
)
def test_only_what_torch_xla_refuses_in_words_is_excused(error: Exception, reason: str | None) -> None:
    assert elsewhere.refused_by_xla(error) == reason
