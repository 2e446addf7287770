"""Apex's Reducer on two real processes: gradients are the mean, and an overflow of one rank is skipped by both."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import wrapprec
from wrapprec.migrate.apex import amp
from wrapprec.migrate.apex.parallel import Reducer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


def _process(rank: int, folder: str) -> None:
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=patience)
    torch.manual_seed(rank)  # the ranks begin apart
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = amp.initialize(model, optimizer, opt_level="O1", loss_scale=64.0, verbosity=0)
    reducer = Reducer(model)
    start = model.weight.detach().clone()
    for factor in (1.0, 1e30 if rank == 1 else 1.0, 1.0):
        optimizer.zero_grad()
        with amp.scale_loss(model(torch.full((1, 3), 1.0 + rank)).sum() * factor, optimizer) as loss:
            loss.backward()
        reducer.reduce()
        nn.utils.clip_grad_value_(model.parameters(), 100.0)
        optimizer.step()
    handle = wrapprec.handle_of(model)
    assert handle is not None
    torch.save((start, model.weight.detach(), handle.skipped_steps), f"{folder}/rank{rank}")
    dist.destroy_process_group()


def test_reducer_averages_over_the_ranks_and_both_skip_what_overflowed_on_one(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    (start, end, skipped), (other_start, other_end, other_skipped) = (torch.load(tmp_path / f"rank{r}") for r in (0, 1))
    assert torch.equal(start, other_start), "every rank has the first one's weights"
    assert skipped == other_skipped == 1 and torch.equal(end, other_end)
    # Two steps of 0.5 times the mean of 1 and 2, numbers that float16 holds.
    assert torch.allclose(end, start - 1.5, atol=1e-6)
