"""The CPU: which low precision its instructions compute in, and what is fast there."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from wrapprec.backends.base import Backend, Capability, Lending
from wrapprec.backends.fast import Switches
from wrapprec.backends.float8 import Float8
from wrapprec.dtypes import name
from wrapprec.precision import Precision

# x86 never reports a bare `bf16`; Arm does.
_BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "avx512_bf16", "bf16": "Arm bf16", "arm_bf16": "Arm bf16"}
_FLOAT16 = {"amx_fp16": "AMX-FP16", "avx512_fp16": "avx512_fp16", "asimdhp": "Arm fp16"}

_NEITHER = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}
_WITHOUT = {"bf16": _NEITHER, "fp16": _NEITHER | {"AVX512_CORE_BF16", "AVX512_CORE_AMX"}}
"""What oneDNN may be held to (ONEDNN_MAX_CPU_ISA), and then does not compute in these."""


@functools.lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Gather the instruction sets that torch and the kernel report.

    Returns:
        The flags in lower case; empty where neither says anything.

    >>> isinstance(cpu_flags(), frozenset)
    True
    """
    # Torch 2.13 lists them all; before that there are only private probes, and the kernel's own list.
    listed: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    flags = {name for name, present in listed.items() if present is True}
    probes = {"amx_bf16": "_is_amx_tile_supported", "amx_fp16": "_is_amx_fp16_supported"}
    probes["avx512_bf16"] = "_is_avx512_bf16_supported"
    flags |= {flag for flag, probe in probes.items() if getattr(torch.cpu, probe, bool)()}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    return frozenset(flags | set(found.group(1).lower().split() if found else ()))


def _first(names: dict[str, str]) -> str | None:
    """The printed name of the first flag that this CPU has."""
    return next((printed for flag, printed in names.items() if flag in cpu_flags()), None)


def onednn_computes_in(kind: str) -> bool:
    """Say whether oneDNN, which alone uses the instructions, is there, on, and not held to older ones.

    With it off, a product in bfloat16 took many times as long as in float32 (AVX512, torch 2.13).

    Args:
        kind: `bf16` or `fp16`.

    >>> isinstance(onednn_computes_in("bf16"), bool)
    True
    """
    onednn: Any = torch.backends.mkldnn
    if not (onednn.is_available() and onednn.enabled):
        return False
    # Torch asks oneDNN for AVX512 only, which computes in float32 and rounds.
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if held in _WITHOUT[kind]:
        return False
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", bool)())


class CpuBackend(Backend):
    """The CPU backend.

    >>> CpuBackend().capability(torch.device("cpu")).device_type
    'cpu'
    """

    name = "cpu"
    # oneDNN's own: with AMX it multiplies in bfloat16, elsewhere it keeps float32's accuracy and is faster than MKL.
    # The setter on `torch.backends.mkldnn` itself would write the flag of every backend.
    switches = Switches(
        (torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
        (torch.backends.mkldnn.conv, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
        (torch.backends.mkldnn.rnn, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    )

    # Torch has a kernel there too, slower than the exact products in float32.
    float8 = Float8(lambda device: False)

    @property
    def lending(self) -> Lending:  # type: ignore[override]  # others need not ask
        """A cast for each parameter, and buckets of small weights.

        A multi-tensor cast lost in whole steps: the caches are cold by then. Small weights stay in them, and there an
        autograd Function for each module takes longer than what it computes. Several processes exchange gradients while
        backward runs, and want each as soon as it is there.
        """
        several = distributed.is_available() and distributed.is_initialized()
        return Lending(bucket_elements=0 if several else 2**14, multi_tensor=False)

    def is_recording(self) -> bool:
        """See `Recording.is_recording`: a CPU records nothing."""
        return False

    def bfloat16_by(self) -> str | None:
        """Name the instructions that compute in bfloat16, if oneDNN uses them.

        Returns:
            `AMX`, `avx512_bf16`, `Arm bf16`, or None.
        """
        return _first(_BFLOAT16) if onednn_computes_in("bf16") else None

    def float16_by(self) -> str | None:
        """Name the instructions that compute in float16, if oneDNN uses them.

        Returns:
            `AMX-FP16`, `avx512_fp16`, `Arm fp16`, or None.
        """
        return _first(_FLOAT16) if onednn_computes_in("fp16") else None

    def capability(self, device: torch.device) -> Capability:
        """See `Backend.capability`."""
        bfloat16, float16 = self.bfloat16_by(), self.float16_by()
        fast = {torch.float32, torch.float64}
        fast |= {torch.bfloat16} if bfloat16 else set()
        fast |= {torch.float16} if float16 else set()
        notes = (
            f"bfloat16 by {bfloat16}" if bfloat16 else "no bfloat16 instructions",
            f"float16 by {float16}" if float16 else "no float16 instructions",
        )
        low = frozenset({torch.bfloat16, torch.float16})
        return Capability("cpu", low, frozenset(fast), self.scaling, notes, self.mixed_norms(device))

    def auto(self, device: torch.device) -> tuple[str, str]:
        """See `Backend.auto`."""
        by = self.bfloat16_by()
        if by:
            return "bf16-mixed", f"this CPU computes in bfloat16 ({by})"
        who = "oneDNN uses" if _first(_BFLOAT16) else "this CPU has"
        return "32-true", f"{who} no bfloat16 instructions, so that low precision would be slower"

    def advise(self, precision: Precision, device: torch.device) -> str | None:
        """See `Backend.advise`."""
        low = precision.activation_dtype
        if low == torch.float16 and not self.float16_by() and self.bfloat16_by():
            return (
                "float16 on a CPU without float16 instructions takes tens of times as long as bfloat16; "
                "bf16-mixed is the better choice"
            )
        has = {torch.float16: self.float16_by(), torch.bfloat16: self.bfloat16_by()}
        if precision.compute_dtype not in has or has[low]:
            return super().advise(precision, device)
        # How much slower, docs/benchmarks/emulated.py prints; it differs widely from one operation to the next.
        return (
            f"{name(low)} on a CPU without {name(low)} instructions is emulated, and slower than float32;"
            " 32-true is the better choice"
        )
