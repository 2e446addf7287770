"""A character GPT on the source text of Python's standard library, with checkpoints; Ctrl-C stops it, --resume goes on.

    pip install wrapprec
    python examples/gpt.py [--policy bf16-mixed] [--steps 600] [--checkpoint gpt.pt] [--resume] [--small]

A run that was stopped and resumed ends with the same bits as one that was not: compare the fingerprints.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import signal
import sysconfig
import time
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wrapprec

CONTEXT = 128


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, symbols: int, width: int, depth: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.place = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        return F.linear(self.norm(self.blocks(x)), self.token.weight)  # the head is tied to the embedding

    @torch.no_grad()
    def write(self, tokens: Tensor, length: int) -> Tensor:
        for _ in range(length):
            logits = self(tokens[:, -CONTEXT:])[:, -1]
            tokens = torch.cat([tokens, torch.multinomial(torch.softmax(logits / 0.8, -1), 1)], 1)
        return tokens


def read_text(small: bool) -> str:
    """Modules of the standard library; characters outside printable ASCII are left out."""
    names = ["argparse.py"] if small else ["argparse.py", "ast.py", "dataclasses.py", "inspect.py", "typing.py"]
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / name).read_text(encoding="utf-8") for name in names)
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


class Stop:
    """Ctrl-C asks to stop after the step that is running; a second Ctrl-C stops at once."""

    asked = False

    def __init__(self) -> None:
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, handle: wrapprec.Handle) -> None:
    """Write a checkpoint; the old one stays whole until the new one is."""
    state = {
        "step": step,
        "model": model.state_dict(),  # float32, with the keys of the unwrapped model
        "optimizer": optimizer.state_dict(),
        "wrapprec": handle.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def fingerprint(model: nn.Module) -> str:
    """A hash of all parameters' bits."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(bytes(parameter.detach().contiguous().view(torch.uint8).flatten().tolist()))
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="bf16-mixed", help="bf16-mixed, bf16-module, 16-mixed, 16-module, auto ...")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint", type=Path, default=Path("gpt.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--small", action="store_true", help="a tiny model and one module of text, to see that it runs")
    args = parser.parse_args()
    width, depth, batch = (32, 1, 4) if args.small else (128, 3, 32)

    text = read_text(args.small)
    symbols = sorted(set(text))
    data = torch.tensor([symbols.index(c) for c in text])
    print(f"{len(text):,} characters, {len(symbols)} symbols; a guess costs {math.log(len(symbols)):.2f}")

    torch.manual_seed(0)
    model = GPT(len(symbols), width, depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    handle = wrapprec.wrap(model, optimizer, args.policy)
    first = 1
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        handle.load_state_dict(state["wrapprec"])
        torch.set_rng_state(state["random"])
        first = state["step"] + 1
        print(f"resumed after step {first - 1} of {args.steps}")

    stop, began = Stop(), time.perf_counter()
    every = max(1, args.steps // 12)
    for step in range(first, args.steps + 1):
        starts = torch.randint(len(data) - CONTEXT - 1, (batch, 1))
        windows = data[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == args.steps:
            seconds = (time.perf_counter() - began) / (step - first + 1)
            skipped = f"{handle.skipped_steps} skipped"
            print(f"step {step:5} of {args.steps}  loss {loss:.3f}  {seconds:.3f} s a step  {skipped}", flush=True)
            save(args.checkpoint, step, model, optimizer, handle)
        if stop.asked and step < args.steps:
            save(args.checkpoint, step, model, optimizer, handle)
            print(f"stopped after step {step}; go on with the same command and --resume")
            return

    print(f"fingerprint of the parameters: {fingerprint(model)}\n")
    model.eval()
    prompt = torch.tensor([[symbols.index(c) for c in "def "]])
    with handle.frozen():  # the weights are cast once, not at every character
        written = model.write(prompt, 40 if args.small else 300)
    print("".join(symbols[i] for i in written[0].tolist()))


if __name__ == "__main__":
    main()
