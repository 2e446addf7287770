"""Accumulation, several losses in one step, and a step only now and then."""

import os

import torch
from torch import nn
import wrapprec


def train(model, optimizer, steps, accumulate=2):
    for step in range(steps):
        x = torch.randn(16, 8)
        out = model(x)
        loss0 = nn.functional.mse_loss(out, x)
        loss1 = out.abs().mean()
        (loss0 / accumulate).backward(retain_graph=True)
        (0.1 * loss1 + 0 * loss0).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        print(f"loss {loss0.item():.6f}")


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapprec.wrap(model, optimizer, "16-mixed")
    train(model, optimizer, steps=int(os.environ.get("STEPS", 8)))


if __name__ == "__main__":
    main()
