"""What quantised weights cost in time and take in memory: one frozen layer and an adapter, forward and backward.

    python docs/benchmarks/quantised.py [--width 1024] [--repeats 15]

Processor time of one thread, so that other work on the machine matters less; the median of the repeats, as a ratio to
the same layer under `bf16-mixed` within each repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import wrapprec
from wrapprec.lowbit.sizes import stored_bytes

POLICIES = ["bf16-mixed", "nf4", "nf4-dq", "fp4", "int8"]


class Adapted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def seconds(model: nn.Module, x: Tensor) -> float:
    began = time.process_time()
    model(x).sum().backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {policy: Adapted(args.width) for policy in POLICIES}
    for policy, model in models.items():
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        wrapprec.wrap(model, optimizer, policy)
    for rows in (1, 64, 1024):
        x = torch.randn(rows, args.width, requires_grad=True)
        times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for repeat in range(args.repeats + 2):
            for policy, model in models.items():
                taken = seconds(model, x)
                if repeat >= 2:
                    times[policy].append(taken)
        base = times["bf16-mixed"]
        print(f"{rows} rows, {1000 * statistics.median(base):.2f} ms under bf16-mixed")
        for policy in POLICIES[1:]:
            ratio = statistics.median(a / b for a, b in zip(times[policy], base, strict=True))
            print(f"    {policy:8} {ratio:5.2f} times")
    for policy in POLICIES[1:]:
        bits = 8 * stored_bytes(policy, (args.width, args.width)) / args.width**2
        print(f"{policy:8} {bits:.3f} bits a weight")


if __name__ == "__main__":
    main()
