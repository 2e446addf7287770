"""Apex with lists of models and optimizers, and a loss scaler for each of three losses."""

import os

import torch
from torch import nn
import wrapprec

torch.manual_seed(0)
netD = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
netG = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-3)
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3)
wrapprec.wrap([netD, netG], [optimizerD, optimizerG], "O1")
criterion = nn.BCEWithLogitsLoss()

for _ in range(int(os.environ.get("STEPS", 8))):
    netD.zero_grad()
    errD_real = criterion(netD(torch.randn(16, 8) + 2), torch.ones(16, 1))
    errD_real.backward()
    fake = netG(torch.randn(16, 4))
    errD_fake = criterion(netD(fake.detach()), torch.zeros(16, 1))
    errD_fake.backward()
    optimizerD.step()

    netG.zero_grad()
    errG = criterion(netD(fake), torch.ones(16, 1))
    (errG / 1).backward()
    optimizerG.step()
    print(f"loss {errD_real.item():.6f}\nloss {errD_fake.item():.6f}\nloss {errG.item():.6f}")
