"""Wrong: gradients are clipped before they are unscaled. A common mistake, which goes by itself."""

import os

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
scaler = torch.amp.GradScaler("cpu")
for _ in range(int(os.environ.get("STEPS", 8))):
    x = torch.randn(16, 8)
    optimizer.zero_grad()
    with torch.amp.autocast("cpu", dtype=torch.float16):
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    scaler.scale(loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    print(f"loss {loss.item():.6f}")
