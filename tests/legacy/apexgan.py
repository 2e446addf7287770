"""Apex with lists of models and optimizers, and a loss scaler for each of three losses."""

import os

import torch
from apex import amp
from torch import nn

torch.manual_seed(0)
netD = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
netG = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-3)
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3)
[netD, netG], [optimizerD, optimizerG] = amp.initialize(
    [netD, netG], [optimizerD, optimizerG], opt_level="O1", num_losses=3, verbosity=0
)
criterion = nn.BCEWithLogitsLoss()

for _ in range(int(os.environ.get("STEPS", 8))):
    netD.zero_grad()
    errD_real = criterion(netD(torch.randn(16, 8) + 2), torch.ones(16, 1))
    with amp.scale_loss(errD_real, optimizerD, loss_id=0) as errD_real_scaled:
        errD_real_scaled.backward()
    fake = netG(torch.randn(16, 4))
    errD_fake = criterion(netD(fake.detach()), torch.zeros(16, 1))
    with amp.scale_loss(errD_fake, optimizerD, loss_id=1) as errD_fake_scaled:
        errD_fake_scaled.backward()
    optimizerD.step()

    netG.zero_grad()
    errG = criterion(netD(fake), torch.ones(16, 1))
    with amp.scale_loss(errG / 1, optimizerG, loss_id=2) as errG_scaled:
        errG_scaled.backward()
    optimizerG.step()
    print(f"loss {errD_real.item():.6f}\nloss {errD_fake.item():.6f}\nloss {errG.item():.6f}")
