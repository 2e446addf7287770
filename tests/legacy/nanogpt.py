"""A language model in the manner of nanoGPT: settings as globals, an assigned context, accumulation, one script."""

import os
from contextlib import nullcontext

import torch
import torch.nn as nn
from torch.nn import functional as F

# settings
max_iters = int(os.environ.get("STEPS", 6))
gradient_accumulation_steps = 2
grad_clip = 1.0
device = "cpu"
dtype = os.environ.get("DTYPE", "bfloat16")  # 'float32', 'bfloat16', or 'float16'
torch.manual_seed(1337)

device_type = "cuda" if "cuda" in device else "cpu"  # for later use in torch.autocast
# note: float16 data type will automatically use a GradScaler
ptdtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
ctx = nullcontext() if dtype == "float32" else torch.amp.autocast(device_type=device_type, dtype=ptdtype)

text = open(os.__file__).read()[:20000]
chars = sorted(set(text))
data = torch.tensor([chars.index(c) for c in text])


def get_batch():
    ix = torch.randint(len(data) - 17, (8,))
    x = torch.stack([data[i : i + 16] for i in ix])
    y = torch.stack([data[i + 1 : i + 17] for i in ix])
    return x, y


class GPT(nn.Module):
    def __init__(self, vocab, width=32):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def forward(self, idx, targets=None):
        logits = self.head(self.block(self.wte(idx)))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=weight_decay)


model = GPT(len(chars))
model.to(device)

# initialize a GradScaler. If enabled=False scaler is a no-op
scaler = torch.amp.GradScaler("cpu", enabled=(dtype == "float16"))

# optimizer
optimizer = model.configure_optimizers(0.1, 1e-2)


# helps estimate an arbitrarily accurate loss over either split using many batches
@torch.no_grad()
def estimate_loss():
    model.eval()
    X, Y = get_batch()
    with ctx:
        logits, loss = model(X, Y)
    model.train()
    return loss.item()


X, Y = get_batch()
for iter_num in range(max_iters):
    for micro_step in range(gradient_accumulation_steps):
        with ctx:
            logits, loss = model(X, Y)
            loss = loss / gradient_accumulation_steps  # scale the loss to account for gradient accumulation
        # immediately async prefetch next batch while model is doing the forward pass on the GPU
        X, Y = get_batch()
        # backward pass, with gradient scaling if training in fp16
        scaler.scale(loss).backward()
    # clip the gradient
    if grad_clip != 0.0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    # step the optimizer and scaler if training in fp16
    scaler.step(optimizer)
    scaler.update()
    # flush the gradients as soon as we can, no need for this memory anymore
    optimizer.zero_grad(set_to_none=True)
    print(f"loss {loss.item() * gradient_accumulation_steps:.6f}")
print(f"loss {estimate_loss():.6f}")
