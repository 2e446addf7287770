"""A classifier in the manner of the ImageNet example: argparse, checkpoints, a training and a validation function."""

import argparse
import os
import tempfile

import torch
import torch.nn as nn
import wrapprec

parser = argparse.ArgumentParser(description="PyTorch training")
parser.add_argument("--steps", default=12, type=int)
parser.add_argument("--lr", default=0.1, type=float)
parser.add_argument("--amp", action="store_true", help="use mixed precision")
parser.add_argument("--resume", default="", type=str)


def main():
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    # one scaler for the whole run
    handle = wrapprec.wrap(model, optimizer, "16-mixed", enabled=args.amp)  # does nothing without --amp

    if args.resume:
        checkpoint = torch.load(args.resume)
        model.load_state_dict(checkpoint["model"])
        handle.load_state_dict(checkpoint["scaler"])

    train(model, criterion, optimizer, args)
    validate(model, criterion, args)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(
            {
                "model": model.state_dict(),
                "scaler": handle.state_dict(),
            },
            os.path.join(folder, "checkpoint.pt"),
        )


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)
        yield x, x[:, :4].argmax(1)


def train(model, criterion, optimizer, args):
    model.train()
    for images, target in batches(args.steps):
        # compute output
        output = model(images)
        loss = criterion(output, target)

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"loss {loss.item():.6f}")


def validate(model, criterion, args):
    model.eval()
    with torch.no_grad():
        for images, target in batches(2):
            print(f"loss {criterion(model(images), target).item():.6f}")


if __name__ == "__main__":
    main()
