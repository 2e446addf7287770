"""The scheduler waits for a step that was not skipped, as people find out by the scale; another comes too early."""

import os

import torch
from torch import nn
import wrapprec

torch.manual_seed(0)


def run(steps):
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    early = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    handle = wrapprec.wrap(
        model,
        optimizer,
        "16-mixed",
        loss_scale=wrapprec.LossScale(init_scale=2.0**8, growth_interval=100),
    )
    for _ in range(steps):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        if len(early.base_lrs) > 1:
            early.step()
        optimizer.step()
        skip_lr_sched = handle.step_was_skipped
        if not skip_lr_sched:
            scheduler.step()
        print(f"loss {loss.item():.6f}")


run(int(os.environ.get("STEPS", 8)))
