"""By hand: a float16 model, float32 copies for the optimizer, and a static loss scale."""

import os

import torch
from torch import nn

SCALE = 128.0
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
model.half()
# the optimizer sees float32 copies
master_params = [p.detach().clone().float() for p in model.parameters()]
for p in master_params:
    p.requires_grad = True
optimizer = torch.optim.SGD(master_params, lr=0.05, momentum=0.9)

for _ in range(int(os.environ.get("STEPS", 8))):
    x = torch.randn(16, 8)
    loss = (model(x.half()).float() - x.sum(1, keepdim=True)).pow(2).mean()
    model.zero_grad()
    (loss * SCALE).backward()
    # gradients to the copies
    for param, master in zip(model.parameters(), master_params):
        master.grad = param.grad.float()
        master.grad.data.div_(SCALE)
    optimizer.step()
    # and the weights back
    for param, master in zip(model.parameters(), master_params):
        param.data.copy_(master.data)
    print(f"loss {loss.item():.6f}")
