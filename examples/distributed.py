"""Digits on several processes under accelerate: `wrap` first, then `prepare`, and the loop stays as it was.

    pip install "wrapprec[examples,accelerate]"
    accelerate launch --num_processes 2 examples/distributed.py [--policy 16-mixed] [--small]

On a CPU accelerate's launcher starts one process only, unless MPI is installed; there torch's launcher does:

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/distributed.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import wrapprec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="auto", help="auto follows `accelerate launch --mixed_precision`")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="a few steps of a narrow model, to see that it runs")
    args = parser.parse_args()
    width, epochs = (32, 2) if args.small else (256, args.epochs)

    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=2)  # precision is wrapprec's
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels))
    train, test = torch.utils.data.random_split(digits, [1500, len(digits) - 1500])
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)

    handle = wrapprec.wrap(model, optimizer, args.policy, scheduler=scheduler)  # the one line
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    for epoch in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1:3}  loss {loss.item():.4f}")

    # The handle was prepared with the optimizer: its scale is saved and loaded with everything else.
    folder = broadcast_object_list([tempfile.mkdtemp()])[0]
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    accelerator.load_state(folder)
    saved = sorted(path.name for path in Path(folder).iterdir())

    with torch.no_grad():
        x, y = (part.to(accelerator.device) for part in test[:])
        accuracy = (model(x).argmax(1) == y).float().mean()
    weights = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum().reshape(1)
    scale = torch.tensor([handle.scale], device=accelerator.device)
    same = [bool((gather(value) == value).all()) for value in (weights, scale)]
    accelerator.print(f"{accelerator.num_processes} processes under {handle.policy}, accuracy {accuracy:.1%}")
    accelerator.print(f"loss scale {handle.scale:g}, {handle.skipped_steps} steps skipped")
    accelerator.print(f"weights and scale are the same everywhere: {all(same)}")
    accelerator.print(f"saved {', '.join(saved)}")
    time.sleep(0.1)  # gloo's threads let go of what was gathered a moment later: while Python exits, that aborts it
    accelerator.end_training()


if __name__ == "__main__":
    main()
