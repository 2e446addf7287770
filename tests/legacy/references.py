"""In the manner of torchvision's references: a scaler or None, asked for everywhere."""

import argparse

import torch
from torch import nn


def train_one_epoch(model, criterion, optimizer, args, scaler=None):
    model.train()
    for step in range(args.steps):
        image = torch.randn(16, 8)
        target = image[:, :3].argmax(1)
        with torch.cuda.amp.autocast(enabled=scaler is not None):
            output = model(image)
            loss = criterion(output, target)

        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            if args.clip_grad_norm is not None:
                # we should unscale the gradients of optimizer's assigned params if do gradient clipping
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            if args.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            optimizer.step()
        print(f"loss {loss.item():.6f}")


def main(args):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    scaler = torch.cuda.amp.GradScaler() if args.amp else None

    checkpoint = {"model": model.state_dict()}
    train_one_epoch(model, criterion, optimizer, args, scaler)
    if scaler:
        checkpoint["scaler"] = scaler.state_dict()


def get_args_parser():
    parser = argparse.ArgumentParser(description="PyTorch Classification Training")
    parser.add_argument("--steps", default=10, type=int)
    parser.add_argument("--clip-grad-norm", default=1.0, type=float)
    parser.add_argument("--amp", action="store_true", help="Use torch.cuda.amp for mixed precision training")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
