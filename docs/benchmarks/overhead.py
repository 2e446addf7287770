"""What wrapping costs a model so small that nothing else counts: user instructions, or processor time, of a step.

    python docs/benchmarks/overhead.py [--repeats 60] [--time]

Counted by the processor (Linux's perf events), instructions hardly depend on what else the machine does; with `--time`,
or where they cannot be counted, microseconds of wall time, of which the median says little on a busy machine. Each
policy is compared with the loop that a user writes by hand with torch.autocast, and GradScaler for float16.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import statistics
import struct
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wrapprec

PHASES = ("forward", "loss", "backward", "step")
RIVALS = {
    "bf16-mixed": torch.bfloat16,
    "bf16-module": torch.bfloat16,
    "16-mixed": torch.float16,
    "16-module": torch.float16,
}
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}


def instructions() -> Callable[[], int]:
    """A counter of this thread's instructions in user mode.

    Raises:
        OSError: they cannot be counted here.
    """
    # struct perf_event_attr: hardware event 1 (instructions), without those of the kernel and of a hypervisor.
    attributes = struct.pack("IIQQQQQ", 0, 112, 1, 0, 0, 0, 1 << 5 | 1 << 6).ljust(112, b"\0")
    number = _PERF_EVENT_OPEN.get(platform.machine()) if platform.system() == "Linux" else None
    if number is None:
        raise OSError("no perf events on this system")
    file = ctypes.CDLL(None, use_errno=True).syscall(number, ctypes.create_string_buffer(attributes), 0, -1, -1, 0)
    if file < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return lambda: int(struct.unpack("Q", os.read(file, 8))[0])


def net(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def phases(policy: str, by_hand: bool) -> tuple[Callable[[], None], ...]:
    """The four parts of a training step."""
    model, dtype = net(), RIVALS[policy]
    x, y = torch.randn(8, 16), torch.randint(4, (8,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scaled = dtype is torch.float16
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled and by_hand)
    if not by_hand:
        wrapprec.wrap(model, optimizer, policy, loss_scale=wrapprec.LossScale(init_scale=1024.0) if scaled else None)
    held: dict[str, Tensor] = {}

    def forward() -> None:
        if by_hand:
            with torch.autocast("cpu", dtype):
                held["out"] = model(x)
        else:
            held["out"] = model(x)

    def loss() -> None:
        optimizer.zero_grad()
        held["loss"] = scaler.scale(F.cross_entropy(held.pop("out").float(), y))

    def backward() -> None:
        held.pop("loss").backward()

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return forward, loss, backward, step


def measure(parts: tuple[Callable[[], None], ...], read: Callable[[], int], repeats: int) -> list[float]:
    """The median of each part, and of the whole."""
    for _ in range(30):
        for part in parts:
            part()
    gc.collect()
    gc.disable()  # it comes at any time, and would be counted
    taken: list[list[int]] = []
    for _ in range(repeats):
        row = []
        for part in parts:
            before = read()
            part()
            row.append(read() - before)
        taken.append([*row, sum(row)])
    gc.enable()
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--time", action="store_true", help="microseconds, also where instructions can be counted")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # float16 is slow on most CPUs
    torch.set_num_threads(1)
    torch.autograd.set_multithreading_enabled(False)  # type: ignore[no-untyped-call]  # counted by thread
    read, unit = time.perf_counter_ns, "microseconds"
    if not args.time:
        try:
            read, unit = instructions(), "thousands of instructions"
        except OSError as error:
            print(f"time, as instructions cannot be counted: {error}")
    print(f"{unit}, wrapprec / by hand; a net of {len(list(net().modules()))} modules, torch {torch.__version__}")
    print(" ".join([f"{'policy':12}", *(f"{name:>15}" for name in (*PHASES, "whole")), "  ratio"]))
    for policy in RIVALS:
        ours, theirs = (measure(phases(policy, by_hand), read, args.repeats) for by_hand in (False, True))
        cells = [f"{a / 1000:7.0f}/{b / 1000:7.0f}" for a, b in zip(ours, theirs, strict=True)]
        print(" ".join([f"{policy:12}", *cells, f"{ours[-1] / theirs[-1]:7.2f}"]))


if __name__ == "__main__":
    main()
