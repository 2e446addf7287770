"""What an AdamW with state in 8 or 4 bits holds, costs and learns, against 32 bits.

    pip install 'wrapprec[bitsandbytes,fp8]'
    python examples/optimizer_bits.py [--threads 1] [--repeats 9] [--small]

Bytes and processor time of a step on matrices of a million elements: the median over steps that take turns, so that
whatever else the machine does weighs on all. The loss: a character model on the source text of Python's argparse.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import wrapprec

Make = Callable[[nn.Module], Optimizer]


def plain(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=3e-3)


def fused(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=3e-3, fused=True)


def low(bits: int) -> Make:
    def make(model: nn.Module) -> Optimizer:
        optimizer = AdamW(model.parameters(), lr=3e-3, fused=True)
        wrapprec.wrap(model, optimizer, "32-true", optimizer_bits=bits)
        return optimizer

    return make


def theirs(model: nn.Module) -> Optimizer:
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=3e-3)
    wrapprec.wrap(model, optimizer, "32-true")
    return optimizer


RIVALS: dict[str, Make] = {
    "AdamW(fused=True)": fused,
    "AdamW()": plain,
    "optimizer_bits=8": low(8),
    "optimizer_bits=4": low(4),
    "bitsandbytes AdamW8bit": theirs,
}


def held(value: object) -> int:
    """Bytes of the tensors in a tree of state; the tables of codes, which all parameters share, are left out."""
    if isinstance(value, dict):
        return sum(held(below) for key, below in value.items() if key not in ("qmap1", "qmap2"))
    return value.nbytes if isinstance(value, Tensor) else 0


def cost(width: int, depth: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Bytes of state and nanoseconds of all threads a step, both for one parameter."""
    optimizers = {}
    for name, make in RIVALS.items():
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizers[name] = make(model)
        optimizers[name].step()
    count = width * width * depth
    times: dict[str, list[float]] = {name: [] for name in RIVALS}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.step()
            times[name].append((time.process_time() - start) / count * 1e9)
    return {
        name: (held(dict(optimizer.state)) / count, statistics.median(times[name]))
        for name, optimizer in optimizers.items()
    }


class Characters(nn.Module):
    """A perceptron that sees the last 16 characters."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, 16)
        self.layers = nn.Sequential(nn.Linear(256, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.token(x).flatten(1)))


def learn(make: Make, steps: int, width: int) -> float:
    """The mean loss of the last fifth of the steps; seed and batches are the same for all."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text("utf-8")
    symbols = {character: number for number, character in enumerate(sorted(set(text)))}
    data = torch.tensor([symbols[character] for character in text])
    torch.manual_seed(0)
    model = Characters(len(symbols), width)
    optimizer = make(model)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - 17, (64,), generator=draw)
        rows = torch.stack([data[start : start + 17] for start in starts])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows[:, :-1]), rows[:, -1])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return statistics.mean(losses[-steps // 5 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="that torch computes with; all cores unless given")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a quick run")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with warnings.catch_warnings():
        # torchao calls, while it is imported, what torch has deprecated.
        warnings.simplefilter("ignore")
        costs = cost(256, 2, 3) if options.small else cost(1024, 8, options.repeats)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'AdamW':24}{'bytes/parameter':>16}{'of 32 bits':>12}{'ns/parameter':>14}{'loss':>9}")
    for name, (size, duration) in costs.items():
        loss = learn(RIVALS[name], 40 if options.small else 600, 128 if options.small else 256)
        share = size / costs["AdamW()"][0]
        print(f"{name:24}{size:16.2f}{share:12.3f}{duration:14.2f}{loss:9.4f}")


if __name__ == "__main__":
    main()
