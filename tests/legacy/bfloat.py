"""bfloat16 without a scaler, and an evaluation that takes the model as an argument."""

import os

import torch
import torch.nn.functional as F
from torch import nn


def evaluate(model, x):
    model.eval()
    with torch.inference_mode():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
    return out.float().pow(2).mean().item()


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "weight_decay": 0.1},
            {"params": model[2].parameters(), "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    for _ in range(int(os.environ.get("STEPS", 8))):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
            loss = F.mse_loss(out, x)
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.6f}")
    print(f"loss {evaluate(model, torch.ones(2, 8)):.6f}")


if __name__ == "__main__":
    main()
