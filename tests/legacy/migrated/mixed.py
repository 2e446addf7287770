"""Old and new names of the same things side by side, also under other names."""

import os

import torch
from torch import nn
import wrapprec

torch.manual_seed(0)
net = nn.Linear(8, 1)
opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
wrapprec.wrap(net, opt, "16-mixed")

for i in range(int(os.environ.get("STEPS", 8))):
    x = torch.randn(16, 8); y = x.mean(1, keepdim=True)
    opt.zero_grad()
    loss = ((net(x) - y) ** 2).mean()
    loss.backward(); opt.step()
    print(f"loss {loss.item():.6f}")

with torch.no_grad():
    print(f"loss {net(torch.ones(1, 8)).sum().item():.6f}")
