"""Train on an XLA device: a TPU, or, where there is none, the CPU device of PJRT, with the same code.

    pip install "wrapprec[xla,examples]"
    python examples/tpu.py [--policy bf16-mixed] [--epochs 10] [--small]

It ends with what the device did: how many programs were compiled and run, and how often a tensor was read on the host.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("PJRT_DEVICE", "CPU")  # a TPU machine sets it to TPU

import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.debug.metrics as metrics
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import wrapprec


class Net(nn.Module):
    """A residual network over the 64 pixels of an image."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="bf16-mixed")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="a few steps of a small model")
    args = parser.parse_args()
    width, depth, epochs = (32, 1, 2) if args.small else (256, 3, args.epochs)

    device = torch_xla.device()
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, x_test, y, y_test = train_test_split(images.float() / 16, labels, test_size=0.2, random_state=0)
    x, y = x.to(device), y.to(device)

    model = Net(width, depth).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    handle = wrapprec.wrap(model, optimizer, args.policy)  # the only line that is not in a plain XLA script
    print("\n".join(str(handle.plan).splitlines()[:4]))

    torch_xla.sync(wait=True)
    metrics.clear_all()
    steps, start = 0, time.perf_counter()
    for epoch in range(epochs):
        total = torch.zeros((), device=device)
        # Batches of one size: another one would be another program.
        for rows in torch.randperm(len(x))[: len(x) // 128 * 128].to(device).split(128):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
            torch_xla.sync()  # as in any XLA script: here a step's program is cut and run
            steps += 1
        print(f"epoch {epoch + 1:2}  loss {float(total) / (len(x) // 128):.3f}")
    seconds = time.perf_counter() - start

    model.eval()
    with torch.no_grad(), handle.frozen():
        right = (model(x_test.to(device)).argmax(1).cpu() == y_test).float().mean()
    compiled = metrics.counter_value("UncachedCompile") or 0
    reads = (metrics.metric_data("TransferFromDeviceTime") or [0])[0]
    print(f"{device}, {handle.policy}: accuracy {right:.1%}, {steps} steps in {seconds:.1f} s with compilation")
    print(f"{compiled} programs compiled, {reads} host reads ({epochs} for the printed losses, 1 for the accuracy)")


if __name__ == "__main__":
    main()
