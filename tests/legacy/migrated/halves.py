"""By hand: a float16 model, float32 copies for the optimizer, and a static loss scale."""

import os

import torch
from torch import nn
import wrapprec

SCALE = 128.0
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
# the optimizer sees float32 copies
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
wrapprec.wrap(model, optimizer, "16-module", loss_scale=SCALE)

for _ in range(int(os.environ.get("STEPS", 8))):
    x = torch.randn(16, 8)
    loss = (model(x.half()).float() - x.sum(1, keepdim=True)).pow(2).mean()
    model.zero_grad()
    loss.backward()
    # gradients to the copies
    optimizer.step()
    # and the weights back
    print(f"loss {loss.item():.6f}")
