"""Weights stored in 16 bits against float32: what a run ends with, and what the weights and a step need in memory.

    pip install wrapprec scikit-learn
    python examples/true_half.py [--steps 600] [--small]

Two runs, each with the same seed under every policy: a network on the handwritten digits of scikit-learn, and a
character GPT on the source text of Python's standard library. Then the bytes a parameter, counted and measured.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import gpt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wrapprec

POLICIES = {
    "32-true": "32-true",
    "kahan": "bf16-true",
    "stochastic": "bf16-true,rounding=stochastic",
    "nearest": "bf16-true,rounding=nearest",
}
Batch = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def digits() -> tuple[nn.Module, Batch, tuple[Tensor, Tensor]]:
    """A network for the digits, batches, and the part of the data that is not trained on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = train[torch.randint(len(train), (64,), generator=generator)]
        return x[rows], y[rows]

    return model, batch, (x[test], y[test])


def characters(small: bool) -> tuple[nn.Module, Batch, tuple[Tensor, Tensor]]:
    """A character GPT, batches of text, and the end of the text, which is not trained on."""
    text = gpt.read_text(small)
    symbols = sorted(set(text))
    tokens = torch.tensor([symbols.index(c) for c in text])
    length, held = (32, 4096) if small else (64, 16384)
    model = gpt.GPT(len(symbols), width=32 if small else 64, depth=2, dropout=0.0)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - held - length - 1, (8,), generator=generator)
        rows = torch.stack([tokens[i : i + length + 1] for i in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    rows = tokens[-held:].view(-1, length)
    return model, batch, (rows[:, :-1], rows[:, 1:])


def train(make: Callable[[], tuple[nn.Module, Batch, tuple[Tensor, Tensor]]], policy: str, steps: int) -> float:
    """The loss on what was not trained on, at the end of a run."""
    torch.manual_seed(0)
    model, batch, (x, y) = make()
    # A small rate: updates are then below bfloat16's resolution, as they are late in every run.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    wrapprec.wrap(model, optimizer, policy)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs, targets = batch(generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).float().flatten(0, -2), targets.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(x).float().flatten(0, -2), y.flatten()).item()


def peak(function: Callable[[], object]) -> int:
    """The bytes that a call allocates at most beyond what there is before it, by torch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    now = most = 0
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(policy: str, width: int) -> list[float]:
    """Per parameter of square matrices: bytes of weights and remainders, of the state, at a step's peak; time in ns."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    handle = wrapprec.wrap(model, optimizer, policy)
    for param in model.parameters():
        param.grad = torch.randn(param.shape).to(param.dtype)
    optimizer.step()
    count = sum(param.numel() for param in model.parameters())
    weights = sum(param.nbytes for param in model.parameters())
    for kept in handle.state_dict().get("rounding", []):
        weights += sum(rest.nbytes for rest in kept["rests"].values())
    state = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    transient = peak(optimizer.step)
    start = time.perf_counter()
    for _ in range(3):
        optimizer.step()
    return [weights / count, state / count, transient / count, (time.perf_counter() - start) / 3 / count * 1e9]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", wrapprec.WrapprecWarning)  # that nearest loses updates is what is shown
    steps = 20 if options.small else options.steps
    print(f"loss on held out data after {steps} steps")
    print(f"{'':12}{'digits':>10}{'characters':>12}")
    for name, policy in POLICIES.items():
        losses = train(digits, policy, steps), train(lambda: characters(options.small), policy, steps)
        print(f"{name:12}{losses[0]:10.4f}{losses[1]:12.4f}")
    width = 64 if options.small else 1024
    print(f"\nper parameter, 8 matrices of {width} x {width}, fused AdamW")
    print(f"{'':12}{'weights':>10}{'state':>8}{'peak of a step':>16}{'time of a step':>16}")
    for name, policy in POLICIES.items():
        weights, state, transient, time_ = measure(policy, width)
        print(f"{name:12}{weights:8.2f} B{state:6.2f} B{transient:14.2f} B{time_:13.2f} ns")


if __name__ == "__main__":
    main()
