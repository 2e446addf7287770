"""A float32 loop with nothing about precision in it."""
import os

import torch
from torch import nn, optim

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = optim.SGD(model.parameters(), lr=0.05)
scheduler = optim.lr_scheduler.StepLR(optimizer, 4)

for epoch in range(int(os.environ.get("STEPS", 8))):
    x = torch.randn(16, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    print(f"loss {loss.item():.6f}")
