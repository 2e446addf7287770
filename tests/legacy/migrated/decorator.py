"""autocast as a decorator of forward, as DataParallel asks for, and around a function of its own."""

import os

import torch
from torch import nn
from torch.cuda.amp import autocast
import wrapprec


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 1)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        with autocast(enabled=False):
            x = x.float().exp().log1p()
        return self.fc2(x)


def main():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    wrapprec.wrap(net, optimizer, "16-mixed")

    @torch.no_grad()
    def evaluate():
        return net(torch.ones(2, 8)).mean()

    for _ in range(int(os.environ.get("STEPS", 8))):
        x = torch.randn(16, 8)
        loss = (net(x) - x.mean(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.6f}")
    print(f"loss {evaluate().item():.6f}")


main()
