"""Train in fp8 by each of torchao's recipes: the plan, how exact gradients are, how the loss ends, what a step costs.

    pip install 'wrapprec[examples,fp8]'
    python examples/fp8.py [--small]

The digits of scikit-learn, on a GPU if there is one. Without kernels for fp8 it is emulated, which is for tests: the
numbers are those of fp8, and a step costs more than in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wrapprec

POLICIES = ["bf16-mixed", "fp8-mixed", "fp8-mixed,recipe=rowwise", "fp8-mixed,recipe=rowwise_with_gw_hp"]


def error(model: nn.Module, policy: str, x: Tensor, y: Tensor) -> float:
    """How far the gradients of a policy are from float64's, all weights together."""
    found = []
    for one in (copy.deepcopy(model), copy.deepcopy(model).double()):
        inputs = x
        if next(one.parameters()).dtype is torch.float32:
            wrapprec.wrap(one, policy=policy)
        else:
            inputs = x.double()
        F.cross_entropy(one(inputs), y).backward()
        found.append(torch.cat([p.grad.double().flatten() for p in one.parameters()]))
    return float((found[0] - found[1]).norm() / found[1].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a narrow model and few steps, to see that it runs")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, steps = (32, 10) if args.small else (1024, 20)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:512], dtype=torch.float32, device=device) / 16
    y = torch.tensor(labels[:512], device=device)
    torch.manual_seed(0)
    hidden = [module for _ in range(3) for module in (nn.Linear(width, width), nn.GELU())]
    model = nn.Sequential(nn.Linear(64, width), nn.GELU(), *hidden, nn.Linear(width, 10)).to(device)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wrapprec.WrapprecWarning)  # The plan says it too.
        print(wrapprec.resolve(model, "fp8-mixed"))
        errors = {policy: error(model, policy, x, y) for policy in POLICIES}
        runs = []
        for policy in POLICIES:
            mine = copy.deepcopy(model)
            optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3, fused=True)
            wrapprec.wrap(mine, optimizer, policy)
            runs.append((mine, optimizer))
    times: list[list[float]] = [[] for _ in POLICIES]
    losses = [0.0 for _ in POLICIES]
    for _ in range(steps):
        for index, (mine, optimizer) in enumerate(runs):  # In turn, so that all meet the same machine.
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(mine(x), y)
            loss.backward()
            optimizer.step()
            losses[index] = loss.item()
            times[index].append(time.perf_counter() - began)
    print(f"\n{'policy':36} gradient error  loss after {steps}  step / bf16-mixed")
    for index, policy in enumerate(POLICIES):
        ratio = statistics.median(a / b for a, b in zip(times[index], times[0], strict=True))
        print(f"{policy:36} {errors[policy]:14.4f}  {losses[index]:13.4f}  {ratio:17.2f}")


if __name__ == "__main__":
    main()
