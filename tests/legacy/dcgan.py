"""A small GAN in the manner of DCGAN: two networks, two optimizers, one scaler, all at the level of the file."""

import os

import torch
import torch.nn as nn
import torch.optim as optim
from torch.cuda import amp

steps = int(os.environ.get("STEPS", 8))
nz = 8
torch.manual_seed(0)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(nz, 32), nn.ReLU(True), nn.Linear(32, 16))

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, input):
        return self.main(input).view(-1)


netG = Generator()
netD = Discriminator()
criterion = nn.BCEWithLogitsLoss()

# setup optimizers
optimizerD = optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
scaler = amp.GradScaler()

for step in range(steps):
    real = torch.randn(16, 16) + 2
    ############################
    # (1) Update D network: maximize log(D(x)) + log(1 - D(G(z)))
    ###########################
    optimizerD.zero_grad()
    with amp.autocast():
        output = netD(real)
        errD_real = criterion(output, torch.ones(16))
        fake = netG(torch.randn(16, nz))
        errD_fake = criterion(netD(fake.detach()), torch.zeros(16))
        errD = errD_real + errD_fake
    scaler.scale(errD).backward()
    scaler.step(optimizerD)

    ############################
    # (2) Update G network: maximize log(D(G(z)))
    ###########################
    optimizerG.zero_grad()
    with amp.autocast():
        errG = criterion(netD(fake), torch.ones(16))  # fake labels are real for generator cost
    scaler.scale(errG).backward()
    scaler.step(optimizerG)

    scaler.update()
    print(f"loss {errD.item():.6f}\nloss {errG.item():.6f}")
