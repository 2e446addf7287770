"""Fine-tune a small Hugging Face Llama on top of its own weights in 4 bits, with a LoRA in twenty lines.

    pip install 'wrapprec[bitsandbytes]' transformers
    python examples/finetune_4bit.py [--policy nf4] [--small]

There is nothing to download: the model is first trained in FP32 on source text of Python's standard library. Then it is
frozen and adapted to other text there, Python's documentation in English: once in FP32, once on quantised weights.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import wrapprec

CONTEXT = 96


class Lora(nn.Module):
    """Adds a trained product of two small matrices to a frozen layer (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)  # at first it changes nothing

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


def add_lora(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Freeze a model, put an adapter around every linear layer of its blocks, and give back what is to be trained."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and ".layers." in name:
            model.set_submodule(name, Lora(layer, rank))
    return [p for p in model.parameters() if p.requires_grad]


def read(folder: str, names: Iterable[str]) -> Tensor:
    """Text of the standard library as its ASCII bytes."""
    where = Path(sysconfig.get_paths()["stdlib"]) / folder
    text = "".join((where / name).read_text("utf-8") for name in names)
    return torch.tensor([b for b in text.encode("ascii", "ignore") if b < 128])


def batch(data: Tensor, size: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - CONTEXT, (size, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT)]


def train(model: Any, data: Tensor, optimizer: torch.optim.Optimizer, steps: int, size: int) -> float:
    """A plain loop; returns seconds a step."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        windows = batch(data, size, generator)
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    return (time.perf_counter() - began) / max(1, steps)


@torch.no_grad()
def evaluate(model: Any, data: Tensor) -> float:
    """The mean loss on windows that are the same for every model."""
    model.eval()
    windows = batch(data, 64, torch.Generator().manual_seed(1))
    return float(model(input_ids=windows, labels=windows).loss)


def weight_bytes(model: nn.Module) -> int:
    """The bytes of all storages that the weights hold; a packed weight's scales, too."""
    tensors: list[Tensor] = []
    for name, tensor in model.state_dict().items():
        tensors += [] if "quant_state" in name else [tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="nf4", help="nf4, nf4-dq, fp4, fp4-dq, int8")
    parser.add_argument("--small", action="store_true", help="a tiny model and a few steps, to see that it runs")
    args = parser.parse_args()
    width, depth, size, first, second = (32, 1, 4, 40, 30) if args.small else (96, 2, 8, 200, 100)

    source = read("", ["argparse.py", "ast.py", "inspect.py", "typing.py"])
    documentation = read("pydoc_data", ["topics.py"])
    held_out, documentation = documentation[:20_000], documentation[20_000:]

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    train(model, source, torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True), first, size)
    print(f"trained in FP32 on source text; its loss on documentation is {evaluate(model, held_out):.3f}\n")

    print("                weights before   wrapped   loss before   after   s a step")
    for policy in ("32-true", args.policy):
        adapted = copy.deepcopy(model)
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(add_lora(adapted, rank=4), lr=5e-3, fused=True)
        before = weight_bytes(adapted)
        handle = wrapprec.wrap(adapted, optimizer, policy)
        wrapped, loss = weight_bytes(adapted), evaluate(adapted, held_out)
        seconds = train(adapted, documentation, optimizer, second, size)
        print(
            f"LoRA, {policy:8} {before:11,} B {wrapped:9,} B {loss:9.3f} {evaluate(adapted, held_out):11.3f}"
            f" {seconds:8.3f}",
            flush=True,
        )
    frozen = sum(p.precision.param_dtype == args.policy for p in handle.plan.placements)
    print(f"\n{frozen} layers are stored as {args.policy}; the embedding, norms and adapters stay in float32")


if __name__ == "__main__":
    main()
