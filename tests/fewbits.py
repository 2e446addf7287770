"""What the tests of low-bit optimizer state share."""

from __future__ import annotations

import importlib
import warnings

import pytest


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
