"""The flag is asked for around everything, and the loop is written twice."""

import argparse

import torch
from torch import nn
import wrapprec

parser = argparse.ArgumentParser()
parser.add_argument("--fp16", action="store_true")
parser.add_argument("--steps", type=int, default=8)
opt = parser.parse_args()

torch.manual_seed(0)
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
wrapprec.wrap(model, optimizer, "16-mixed", enabled=opt.fp16)

for _ in range(opt.steps):
    x = torch.randn(16, 8)
    optimizer.zero_grad()
    loss = (model(x) - x.mean(1, keepdim=True)).pow(2).mean()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.6f}")
