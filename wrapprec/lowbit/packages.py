"""Where bitsandbytes and torchao are imported: nowhere else, and not before they are needed."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from wrapprec.errors import PolicyError, message


def _load(module: str, extra: str, wish: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name in (None, package)
        fitting = "" if missing else f", with a {package} that was made for torch {torch.__version__}"
        raise PolicyError(
            message(
                f"{package} to be installed, for {wish}",
                f"{type(error).__name__}: {error}",
                remedy=f"pip install 'wrapprec[{extra}]'{fitting}",
            )
        ) from error


def bitsandbytes(wish: str) -> Any:
    """The package bitsandbytes.

    Args:
        wish: what it is needed for, as the error says it.

    Raises:
        PolicyError: it is not installed; the extra is named.
    """
    return _load("bitsandbytes", "bitsandbytes", wish)


def torchao(module: str, wish: str) -> Any:
    """A module of the package torchao.

    Args:
        module: its dotted name below ``torchao``.
        wish: what it is needed for, as the error says it.

    Raises:
        PolicyError: the package is not installed, or has no such module; the extra is named.
    """
    return _load(f"torchao.{module}", "fp8", wish)
