"""The scheduler waits for a step that was not skipped, as people find out by the scale; another comes too early."""

import os

import torch
from torch import nn

torch.manual_seed(0)


def run(steps):
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    early = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    for _ in range(steps):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        scaler.scale(loss).backward()
        if len(early.base_lrs) > 1:
            early.step()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skip_lr_sched = scale > scaler.get_scale()
        if not skip_lr_sched:
            scheduler.step()
        print(f"loss {loss.item():.6f}")


run(int(os.environ.get("STEPS", 8)))
