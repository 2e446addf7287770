"""Step time and peak memory against torch.autocast, in pairs, with intervals; writes JSON.

    pip install wrapprec
    python examples/benchmark.py [--repeats 40] [--output benchmark.json] [--small]

In every repeat each rival trains the same batches, in an order drawn anew; the ratio to autocast is taken within the
repeat, so that whatever else the machine does weighs on both sides. Reported: the median ratio, and a 95 % interval
by resampling the repeats (percentile bootstrap). All rivals use the same fused AdamW. Peak memory: the most that
tensors hold at once in a training step, counted from the allocator's events; it is the same in every run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import wrapprec

RIVALS = ("autocast", "bf16-mixed", "bf16-module", "float32")


# The models


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, symbols: int, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.short = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Sequential):
    def __init__(self, width: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for stage in range(3):
            wide = width * 2**stage
            layers.append(Residual(wide if stage == 0 else wide // 2, wide, 1 if stage == 0 else 2))
            layers += [Residual(wide, wide, 1) for _ in range(depth - 1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def make(job: str, small: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and one batch for it."""
    torch.manual_seed(0)
    if job == "gpt":
        symbols, width, depth, context, batch = (64, 64, 1, 16, 2) if small else (4096, 384, 6, 128, 8)
        tokens = torch.randint(symbols, (batch, context + 1))
        return GPT(symbols, width, depth, context), tokens[:, :-1], tokens[:, 1:].flatten()
    width, depth, size, batch = (8, 1, 8, 2) if small else (64, 2, 32, 32)
    return ResNet(width, depth), torch.randn(batch, 3, size, size), torch.randint(10, (batch,))


def stepper(rival: str, job: str, small: bool) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """One training step of a rival, on a model of its own; and what it holds between steps, gradients apart."""
    model, x, y = make(job, small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if rival.startswith("bf16"):
        wrapprec.wrap(model, optimizer, rival)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=rival == "autocast"):
            logits = model(x)
        F.cross_entropy(logits.float().flatten(0, -2), y).backward()
        optimizer.step()

    def held() -> list[Tensor]:
        state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        return [*model.parameters(), *model.buffers(), *state]

    return step, held


# Measuring


def measure_time(job: str, args: argparse.Namespace) -> dict[str, Any]:
    steps = {rival: stepper(rival, job, args.small)[0] for rival in RIVALS}
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    draw = random.Random(0)
    times: dict[str, list[float]] = {rival: [] for rival in RIVALS}
    for _ in range(args.repeats):
        for rival in draw.sample(RIVALS, len(RIVALS)):
            began = time.perf_counter()
            for _ in range(args.steps):
                steps[rival]()
            times[rival].append((time.perf_counter() - began) / args.steps)
    report: dict[str, Any] = {}
    for rival in RIVALS:
        ratios = [mine / base for mine, base in zip(times[rival], times["autocast"], strict=True)]
        report[rival] = {"seconds": statistics.median(times[rival]), **with_interval(ratios)}
    return report


def with_interval(ratios: list[float], resamples: int = 2000) -> dict[str, Any]:
    """The median, and the percentile bootstrap's 95 % interval of it."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]
    return {"ratio": statistics.median(ratios), "interval": [low, high]}


def measure_memory(job: str, small: bool) -> dict[str, Any]:
    """Peaks in MB by rival."""
    peaks = {rival: peak_memory(rival, job, small) for rival in RIVALS}
    return {rival: {"megabytes": peak, "ratio": peak / peaks["autocast"]} for rival, peak in peaks.items()}


def peak_memory(rival: str, job: str, small: bool) -> float:
    """The most MB that tensors hold at once in a training step: parameters, optimizer state, and what it allocates."""
    step, held = stepper(rival, job, small)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    now = peak = 0
    # Not `trace.events()`: it leaves the allocator's events out.
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return (sum(t.numel() * t.element_size() for t in held()) + peak) / 2**20


def measure_wrap(modules: int) -> dict[str, float]:
    """Seconds that resolve, and wrap (which resolves too), take on a model of so many modules."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(modules // 4)))
    optimizer = torch.optim.AdamW(model.parameters())
    began = time.perf_counter()
    wrapprec.resolve(model, "16-module")
    resolved = time.perf_counter()
    with wrapprec.wrap(model, optimizer, "bf16-module"):
        done = time.perf_counter()
    return {"modules": len(list(model.modules())), "resolve_seconds": resolved - began, "wrap_seconds": done - resolved}


def machine() -> dict[str, Any]:
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        name = found.group(1) if found else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "wrapprec": wrapprec.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=40, help="pairs")
    parser.add_argument("--steps", type=int, default=2, help="training steps of each rival in one repeat")
    parser.add_argument("--warmup", type=int, default=3, help="training steps before anything is timed")
    parser.add_argument("--modules", type=int, default=5000, help="size of the model that wrap is timed on")
    parser.add_argument("--jobs", nargs="+", choices=("gpt", "resnet"), default=("gpt", "resnet"))
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--small", action="store_true", help="tiny models and few repeats, to see that it runs")
    args = parser.parse_args()
    if args.small:
        args.repeats, args.warmup, args.modules = 4, 1, 500

    report: dict[str, Any] = {"machine": machine(), "small": args.small, "repeats": args.repeats, "steps": args.steps}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    if args.small:
        print("small: this shows that it runs; the numbers mean nothing")
    for job in args.jobs:
        size = sum(p.numel() for p in make(job, args.small)[0].parameters())
        print(f"\n{job}, {size / 1e6:.1f} M parameters: ratio to torch.autocast in bfloat16")
        report[job] = {"parameters": size, "time": measure_time(job, args)}
        for rival, row in report[job]["time"].items():
            low, high = row["interval"]
            print(f"  step time    {rival:12} {row['ratio']:.3f}  [{low:.3f}, {high:.3f}]  {row['seconds']:.4f} s")
        report[job]["memory"] = measure_memory(job, args.small)
        for rival, row in report[job]["memory"].items():
            print(f"  peak memory  {rival:12} {row['ratio']:.3f}  {row['megabytes']:.0f} MB")
    report["wrap"] = measure_wrap(args.modules)
    row = report["wrap"]
    print(f"\n{row['modules']} modules: resolve {row['resolve_seconds']:.2f} s, wrap {row['wrap_seconds']:.2f} s")
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
