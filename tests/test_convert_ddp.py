"""Converted models under DistributedDataParallel: two real processes, which must keep the same weights."""

from __future__ import annotations

import datetime
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ddp_checks import leave
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import wrapprec
from wrapprec import WrapprecError, WrapprecWarning
from wrapprec.lowbit.words import split

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, steps: int = 5) -> None:
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))[rows]
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


def mine() -> slice:
    return slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)


def assert_same_everywhere(tensor: Tensor) -> None:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    assert torch.equal(both[0], both[1])


def _trained(policy: str) -> tuple[nn.Module, wrapprec.Handle]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(10 + dist.get_rank())  # as loops do that draw other data on each rank
    handle = wrapprec.wrap(model, optimizer, policy)
    train(DDP(model), optimizer, mine())
    return model, handle


@check
def kahan_trains_as_one_process_does() -> None:
    model, _ = _trained("bf16-true")
    alone = net()
    train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-2), slice(0, 8))
    for param, true in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same_everywhere(param.detach())
        # Adam moves a weight by 1e-2 a step, whichever way; a gradient rounded to bfloat16 seldom changes its sign.
        assert (param.float() - true).abs().mean() < 0.1 * 5e-2


@check
def stochastic_rounding_is_the_same_on_both() -> None:
    model, _ = _trained("bf16-true,rounding=stochastic")
    for param in model.parameters():
        assert_same_everywhere(param.detach())


@check
def float64_is_reduced() -> None:
    model, _ = _trained("64-true")
    alone = net().double()
    train(_Doubles(alone), torch.optim.AdamW(alone.parameters(), lr=1e-2), slice(0, 8))
    for param, true in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same_everywhere(param.detach())
        assert torch.allclose(param, true, rtol=1e-5)  # the loss is taken in float32


class _Doubles(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x.double())


@check
def ddp_before_wrap_is_refused() -> None:
    model = net()
    ddp = DDP(model)
    for one in (model, ddp):
        with pytest.raises(WrapprecError) as error:
            wrapprec.wrap(one, policy="bf16-true")
        assert str(error.value) == (
            "Expected wrap before DistributedDataParallel, where the parameters change their dtype.\n"
            "Received: parameters whose gradients a DistributedDataParallel reduces already, which would stop\n"
            "Remedy: call wrap(model, ...) first, then DistributedDataParallel(model)"
        )
    assert model[0].weight.dtype is torch.float32
    low = net().to(torch.bfloat16)
    low[1].float()
    around = DDP(low)
    wrapprec.wrap(low, policy="bf16-true")  # nothing is to be converted
    train(around, torch.optim.SGD(low.parameters(), lr=0.1), mine())
    assert_same_everywhere(low[0].weight.detach())


@check
def unwrap_under_ddp_says_that_it_must_be_built_anew() -> None:
    model = net()
    handle = wrapprec.wrap(model, policy="bf16-true")
    ddp = DDP(model)
    with pytest.warns(WrapprecWarning, match=r"Remedy: build DistributedDataParallel\(model\) anew"):
        handle.unwrap()
    del ddp
    assert split(model[0].weight.detach(), torch.bfloat16)[1].eq(0).all()


@check
def gradients_wider_than_the_parameters_are_refused_by_torch() -> None:
    # The last check: the backward was left in the middle.
    if hasattr(Tensor, "grad_dtype"):
        with pytest.raises(RuntimeError, match=r"BFloat16.*Float|dtype"):
            _trained("bf16-true,grads=float32")


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "float16 on a CPU without float16 instructions")
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=patience)
    outcomes: dict[str, str] = {}
    for name, function in CHECKS.items():
        try:
            function()
            outcomes[name] = "passed"
        except Exception:
            outcomes[name] = f"rank {rank}: {traceback.format_exc()}"
            break  # the processes may be out of step now
    torch.save(outcomes, f"{folder}/{rank}")
    if set(outcomes.values()) == {"passed"}:
        leave()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: Any) -> list[dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp("two")
    mp.spawn(main, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(outcomes: list[dict[str, str]], name: str) -> None:
    for outcome in outcomes:
        assert outcome.get(name, "not run, after another's failure") == "passed"
