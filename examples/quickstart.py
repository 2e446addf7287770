"""Train a small convolutional network on scikit-learn's digits three ways: plain FP32, torch.amp by hand, wrapprec.

    pip install "wrapprec[examples]"
    python examples/quickstart.py [--policy bf16-mixed] [--epochs 15] [--small]

Each way trains in a process of its own, one after the other, so that none warms up, or pays for, another.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import itertools
import multiprocessing
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import Optimizer

import wrapprec

Batches = Iterable[tuple[Tensor, Tensor]]
Report = Callable[[Tensor], None]


# The three loops. Compare the second and the third with the first.


def train_plain(model: nn.Module, optimizer: Optimizer, batches: Batches, policy: str, report: Report) -> int:
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(loss)
    return 0


def train_by_hand(model: nn.Module, optimizer: Optimizer, batches: Batches, policy: str, report: Report) -> int:
    dtype = torch.float16 if policy.startswith("16") else torch.bfloat16
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    skipped = 0
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        report(loss)
    return skipped


def train_wrapped(model: nn.Module, optimizer: Optimizer, batches: Batches, policy: str, report: Report) -> int:
    handle = wrapprec.wrap(model, optimizer, policy)
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(loss)
    return handle.skipped_steps


WAYS = {"plain FP32": train_plain, "torch.amp by hand": train_by_hand, "wrapprec": train_wrapped}


# The model and the data.


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(inner)))


class ConvNet(nn.Module):
    """For images of 8x8 pixels."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images for training and for testing, and their labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    return x_train.float().view(-1, 1, 8, 8), y_train, x_test.float().view(-1, 1, 8, 8), y_test


# One run, in a process of its own.


@dataclass
class Result:
    accuracy: float
    seconds: float
    memory: float | None
    skipped: int


def run(way: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Train, test and measure; sends a loss for every step, then the Result."""
    x_train, y_train, x_test, y_test = digits()
    torch.manual_seed(0)
    memory = PeakMemory()
    model = ConvNet(depth=args.depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)

    def batches() -> Batches:
        for epoch in range(args.epochs):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - epoch / args.epochs)
            for rows in torch.randperm(len(x_train)).split(args.batch):
                yield x_train[rows], y_train[rows]

    times = [time.perf_counter()]

    def report(loss: Tensor) -> None:
        value = loss.item()
        times.append(time.perf_counter())
        pipe.send(value)

    skipped = WAYS[way](model, optimizer, batches(), args.policy, report)
    peak = memory.megabytes()
    model.eval()
    by_hand = torch.autocast("cpu", torch.float16 if args.policy.startswith("16") else torch.bfloat16)
    with torch.no_grad(), by_hand if way == "torch.amp by hand" else contextlib.nullcontext():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    steps = [after - before for before, after in itertools.pairwise(times)]
    pipe.send(Result(accuracy, statistics.median(steps), peak, skipped))


class PeakMemory:
    """The process's peak of resident memory above what it held when this was made; None where Linux is not."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.before = self._read("VmRSS")

    def megabytes(self) -> float | None:
        peak = self._read("VmHWM")
        return None if peak is None or self.before is None else (peak - self.before) / 1024

    @staticmethod
    def _read(key: str) -> int | None:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith(key)).split()[1])
        return None


def watch(way: str, args: argparse.Namespace, progress: Progress, steps: int) -> Result:
    """Run one way in a new process, and draw its progress."""
    bar = progress.add_task(way, total=steps, loss="")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=run, args=(way, args, sender), daemon=True)
    process.start()
    sender.close()
    while True:
        try:
            message: Any = receiver.recv()
        except EOFError:
            raise SystemExit(f"the run '{way}' ended with exit code {process.join() or process.exitcode}") from None
        if isinstance(message, Result):
            process.join()
            return message
        progress.update(bar, advance=1, loss=f"loss {message:.3f}")


def one_line_diff() -> str:
    """What changes from the plain loop to the wrapped one, from the source above."""
    loops = []
    for loop in (train_plain, train_wrapped):
        body = textwrap.dedent(inspect.getsource(loop).partition("\n")[2]).splitlines()
        loops.append([line for line in body if not line.startswith("return")])
    return "\n".join(list(difflib.unified_diff(*loops, lineterm="", n=99))[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="bf16-mixed", help="bf16-mixed, bf16-module, 16-mixed, 16-module, auto ...")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="one epoch of a shallow model, to see that it runs")
    args = parser.parse_args()
    args.depth = 1 if args.small else 3
    if args.small:
        args.epochs, args.batch = 1, 128

    console = Console()
    console.rule("The plan")
    plan = wrapprec.resolve(ConvNet(depth=args.depth), args.policy)
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)

    console.rule("Training")
    steps = args.epochs * -(-len(digits()[0]) // args.batch)
    columns = TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        results = {way: watch(way, args, progress, steps) for way in WAYS}

    table = Table(title=f"{args.policy} on digits, {steps} steps of {args.batch} images")
    table.add_column("way")
    for name in ("accuracy", "seconds a step", "peak memory", "skipped steps"):
        table.add_column(name, justify="right")
    for way, result in results.items():
        memory = "-" if result.memory is None else f"{result.memory:.0f} MB"
        table.add_row(way, f"{result.accuracy:.1%}", f"{result.seconds:.4f}", memory, str(result.skipped))
    console.print(table)
    console.print(
        "Seconds a step: the median; the model is so small that overhead counts, and examples/benchmark.py compares"
        " larger ones in pairs. Peak memory: how far the process's resident memory rose while training, libraries that"
        " were loaded on the way included.",
        style="dim",
        highlight=False,
    )

    console.rule("The one-line diff")
    console.print(Syntax(one_line_diff(), "diff", background_color="default"))


if __name__ == "__main__":
    main()
