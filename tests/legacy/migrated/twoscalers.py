"""Two models, each with an optimizer and a scaler of its own, saved under their own keys."""

import os

import torch
from torch import nn
import wrapprec

torch.manual_seed(0)
encoder = nn.Linear(8, 4)
decoder = nn.Linear(4, 8)
enc_opt = torch.optim.SGD(encoder.parameters(), lr=0.1)
dec_opt = torch.optim.SGD(decoder.parameters(), lr=0.1)
handle = wrapprec.wrap(
    encoder,
    enc_opt,
    "16-mixed",
    loss_scale=wrapprec.LossScale(init_scale=256.0),
)
handle2 = wrapprec.wrap(
    decoder,
    dec_opt,
    "16-mixed",
    loss_scale=wrapprec.LossScale(init_scale=256.0),
)

for _ in range(int(os.environ.get("STEPS", 8))):
    x = torch.randn(16, 8)
    code = encoder(x)
    first = code.float().pow(2).mean()
    second = (decoder(code.detach()) - x).pow(2).mean()
    enc_opt.zero_grad()
    dec_opt.zero_grad()
    first.backward()
    second.backward()
    enc_opt.step()
    dec_opt.step()
    print(f"loss {first.item():.6f}\nloss {second.item():.6f}")
state = {"encoder": handle.state_dict(), "decoder": handle2.state_dict()}
