"""What of the core's tests runs on an XLA device, and the reason for everything that does not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

_FLOAT16 = "asks for float16, which XLA devices replace by bfloat16, or for a loss scale, which they do without"


def start_xla() -> None:
    """Make tensors on the XLA device; compile fast rather than well, for every test is a new program."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    import torch_xla

    torch.set_default_device(torch_xla.device())
    _skip_float16()


def _skip_float16() -> None:
    """Skip a test at the moment it wraps in float16."""
    from wrapprec.backends.xla import XlaBackend

    advise = XlaBackend.advise

    def skipping(self, precision, device):
        if advise(self, precision, device) is not None:
            pytest.skip(_FLOAT16)

    XlaBackend.advise = skipping


FILES = {}
TESTS = {}


def skip_on_xla(items: list[pytest.Item]) -> None:
    """Skip what has a reason against it."""
    for item in items:
        spec = getattr(item, "callspec", None)
        reason = FILES.get(item.path.name) or TESTS.get((item.path.name, getattr(item, "originalname", None)))
        if reason is None and spec is not None and ("fused" in spec.id):
            reason = "fused"
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
