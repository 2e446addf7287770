"""Digits on a model that FSDP2 shards over several processes: `fully_shard` first, then `wrap`, and a plain loop.

    torchrun --nproc-per-node 2 examples/sharded.py [--policy 16-mixed] [--small]

FSDP sends each block's weights in the policy's compute dtype, wrapprec casts the activations and scales the loss.
Weights, optimizer and handle are saved and loaded by torch.distributed.checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import wrapprec

# torch's own, where a model is on a CPU: that its checkpoints are not made with CUDA streams.
warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="bf16-mixed")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="a few steps of a narrow model, to see that it runs")
    args = parser.parse_args()
    width, epochs = (32, 2) if args.small else (256, args.epochs)

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights everywhere, and the same order of the digits
    pixels, labels = (torch.from_numpy(part).to(device) for part in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    order = torch.randperm(len(pixels)).to(device)
    train, test = order[:1536], order[1536:]
    blocks = [Block(width) for _ in range(2)]
    model = nn.Sequential(nn.Linear(64, width), *blocks, nn.Linear(width, 10)).to(device)

    for module in (*blocks, model):
        fully_shard(module, mp_policy=wrapprec.fsdp_policy(args.policy))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    handle = wrapprec.wrap(model, optimizer, args.policy)  # the one line

    for epoch in range(epochs):
        for rows in train[torch.randperm(len(train)).to(device)].split(64):
            mine = rows.chunk(world)[rank]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pixels[mine]), labels[mine])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1:3}  loss {loss.item():.4f}")

    with torch.no_grad():
        accuracy = (model(pixels[test]).argmax(1) == labels[test]).float().mean()

    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "handle": handle}
    dcp.save(state, checkpoint_id=folders[0])
    before = handle.state_dict()
    dcp.load(state, checkpoint_id=folders[0])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    states = [None] * world
    dist.all_gather_object(states, handle.state_dict())
    if rank == 0:
        held = sum(param.to_local().numel() for param in model.parameters())
        print(f"{world} processes under {handle.policy}, accuracy {accuracy:.1%}")
        print(f"this one holds {held:,} of {sum(param.numel() for param in model.parameters()):,} weights")
        print(f"loss scale {handle.scale:g}, {handle.skipped_steps} steps skipped")
        print(f"the same everywhere, and after loading: {all(one == before for one in states)}")
    time.sleep(0.1)  # gloo's threads let go of what was gathered a moment later: while Python exits, that aborts it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
