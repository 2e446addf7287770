"""Two models, each with an optimizer and a scaler of its own, saved under their own keys."""

import os

import torch
from torch import nn
from torch.amp import GradScaler, autocast

torch.manual_seed(0)
encoder = nn.Linear(8, 4)
decoder = nn.Linear(4, 8)
enc_opt = torch.optim.SGD(encoder.parameters(), lr=0.1)
dec_opt = torch.optim.SGD(decoder.parameters(), lr=0.1)
enc_scaler = GradScaler("cpu", init_scale=256.0)
dec_scaler = GradScaler("cpu", init_scale=256.0)

for _ in range(int(os.environ.get("STEPS", 8))):
    x = torch.randn(16, 8)
    with autocast("cpu", dtype=torch.float16):
        code = encoder(x)
        first = code.float().pow(2).mean()
        second = (decoder(code.detach()) - x).pow(2).mean()
    enc_opt.zero_grad()
    dec_opt.zero_grad()
    enc_scaler.scale(first).backward()
    dec_scaler.scale(second).backward()
    enc_scaler.step(enc_opt)
    dec_scaler.step(dec_opt)
    enc_scaler.update()
    dec_scaler.update()
    print(f"loss {first.item():.6f}\nloss {second.item():.6f}")
state = {"encoder": enc_scaler.state_dict(), "decoder": dec_scaler.state_dict()}
