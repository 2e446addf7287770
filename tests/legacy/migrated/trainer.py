"""A class that trains: everything hangs on self, and mixed precision on a flag of its own."""

import os

import torch
from torch import nn
import wrapprec


class Trainer:
    def __init__(self, model, lr=0.05, use_amp=True):
        self.model = model
        self.use_amp = use_amp
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.handle = wrapprec.wrap(
            self.model,
            self.optimizer,
            "16-mixed",
            loss_scale=wrapprec.LossScale(init_scale=1024.0),
            enabled=use_amp,
        )
        self.criterion = nn.MSELoss()

    def train_step(self, x, y):
        self.optimizer.zero_grad()
        loss = self.compute_loss(x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def compute_loss(self, x, y):
        return self.criterion(self.model(x), y)

    def state_dict(self):
        return {"model": self.model.state_dict(), "scaler": self.handle.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.handle.load_state_dict(state["scaler"])

    def fit(self, steps):
        for _ in range(steps):
            x = torch.randn(16, 8)
            loss = self.train_step(x, x.sum(1, keepdim=True))
            print(f"loss {loss.item():.6f}, scale {self.handle.scale}")


if __name__ == "__main__":
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
    trainer.fit(int(os.environ.get("STEPS", 10)))
    trainer.load_state_dict(trainer.state_dict())
