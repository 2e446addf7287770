"""What of the core's tests runs on an XLA device (`pytest --device xla`), and the reason for everything that does not.

Three tables say what is left out: whole files, single tests, and what torch_xla itself refuses, by its words. Besides,
a test ends at the moment it wraps in float16. `test_xla.py` has what is XLA's own, compiled as a training loop is.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

FILES = {
    "no loss scale on XLA, which these are about": "audit diagnose overflow schedulers step verdict",
    "chooses the device itself, and is about that": "backends cuda fast recording xla",
    "processes of their own, which compute on the CPU": "ddp examples docs import",
    "nn.DataParallel is for CUDA; here it is simulated by threads on the CPU": "replicas threads",
    "compiles or exports; what openxla compiles is in test_xla.py": "capture compile traced",
    "torch.utils.checkpoint knows no XLA; torch_xla's own is in test_xla.py": "checkpointing",
    "torch_xla 2.9 ends the process in packed sequences; an LSTM is in test_xla.py": "recurrent",
    "looks at which of the CPU's attention kernels runs": "attention",
    "moves tensors between the host and the device": "offload",
    "needs hundreds of programs: too slow where each is compiled": "generate long_runs random_programs zoo",
}
"""Reasons, and the files, without `test_` and `.py`."""

TESTS: dict[str, str] = {}
"""Reasons, and the functions (`file::function`)."""

REFUSED = {
    "module 'torch' has no attribute 'xla'": "torch.utils.checkpoint knows no XLA; torch_xla's own is in test_xla.py",
    "Cannot set version_counter for inference tensor": "torch_xla has no linear layers in inference mode",
    "SparseXLA": "XLA has no sparse tensors",
    "`fused=True` requires": "torch itself refuses fused optimizers on XLA",
    "for outputs with complex dtype": "torch_xla has no gradients of complex numbers",
    "an autograd kernel was not registered": "torch_xla has no gradient of this operation",
    "mixed precision is disallowed": "torch_xla does not promote operands of different dtypes here",
    "INTERNAL ASSERT FAILED": "torch_xla fails by itself",
}
"""What torch_xla says when it cannot, and what that means. Wrong numbers are never among it."""


def start_xla() -> None:
    """Make tensors on the XLA device, and compile each operation by itself: programs of tests never come again."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch_xla
    import torch_xla.experimental

    torch_xla.experimental.eager_mode(True)
    torch.set_default_device(torch_xla.device())
    seed_host = torch.manual_seed

    def manual_seed(seed: int) -> torch.Generator:
        torch_xla.manual_seed(seed)
        return seed_host(seed)

    # As on CUDA devices: one call seeds them all.
    torch.manual_seed = manual_seed

    from wrapprec.backends.xla import XlaBackend

    advise = XlaBackend.advise

    def skip_float16(backend: XlaBackend, precision: Any, device: torch.device) -> None:
        if advise(backend, precision, device) is not None:
            pytest.skip("asks for float16, of which XLA makes bfloat16, without a loss scale")

    XlaBackend.advise = skip_float16  # type: ignore[method-assign]


def skip_on_xla(items: list[pytest.Item]) -> None:
    """Skip what a table has a reason against."""
    files = {f"test_{name}.py": reason for reason, names in FILES.items() for name in names.split()}
    tests = {name: reason for reason, names in TESTS.items() for name in names.split()}
    for item in items:
        name = f"{item.path.stem.removeprefix('test_')}::{getattr(item, 'originalname', item.name)}"
        reason = files.get(item.path.name) or tests.get(name)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def refused_by_xla(error: BaseException) -> str | None:
    """The reason why torch_xla cannot run a test, where its error says so."""
    text = str(error)
    return next((reason for words, reason in REFUSED.items() if words in text), None)
