"""Old and new names of the same things side by side, also under other names."""

import os

import torch
import torch.cuda.amp as cuda_amp
from torch import autocast, nn
from torch.amp import GradScaler as Scaler

torch.manual_seed(0)
net = nn.Linear(8, 1)
opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
grad_scaler: Scaler = Scaler("cpu")

for i in range(int(os.environ.get("STEPS", 8))):
    x = torch.randn(16, 8); y = x.mean(1, keepdim=True)
    opt.zero_grad()
    with autocast("cpu", torch.float16): loss = ((net(x) - y) ** 2).mean()
    grad_scaler.scale(loss).backward(); grad_scaler.step(opt); grad_scaler.update()
    print(f"loss {loss.item():.6f}")

with cuda_amp.autocast(), torch.no_grad():
    print(f"loss {net(torch.ones(1, 8)).sum().item():.6f}")
