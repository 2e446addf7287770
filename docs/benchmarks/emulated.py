"""Prints how long low precision takes on this CPU: `[ONEDNN_MAX_CPU_ISA=AVX2] python docs/benchmarks/emulated.py`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wrapprec.backends.cpu import CpuBackend

JOBS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear 256 x 512 x 512": (F.linear, (256, 512), (512, 512)),
    "linear 16 x 512 x 512": (F.linear, (16, 512), (512, 512)),
    "convolution 32 -> 32, 3 x 3": (F.conv2d, (4, 32, 28, 28), (32, 32, 3, 3)),
    "convolution 64 -> 64, 1 x 1": (F.conv2d, (4, 64, 28, 28), (64, 64, 1, 1)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(repeats: int = 20) -> None:
    """Time each job in each dtype, forward and backward, by turns; print the ratios of the best times."""
    torch.manual_seed(0)
    backend = CpuBackend()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads;", *backend.capability(torch.device("cpu")).notes
    )
    for name, (function, *shapes) in JOBS.items():
        best = dict.fromkeys(DTYPES, float("inf"))
        operands = {dtype: [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes] for dtype in DTYPES}
        for _ in range(repeats):
            for dtype, given in operands.items():
                begin = time.perf_counter()
                function(*given).sum().backward()
                best[dtype] = min(best[dtype], time.perf_counter() - begin)
        whole, brain, half = (best[dtype] for dtype in DTYPES)
        print(
            f"{name}: bfloat16 takes {brain / whole:.2f} of float32's time,"
            f" float16 {half / whole:.1f}, and {half / brain:.1f} of bfloat16's"
        )


if __name__ == "__main__":
    main()
