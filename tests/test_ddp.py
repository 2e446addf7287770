"""Models under DistributedDataParallel: two and four real processes, which run what is in `ddp_checks`."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import ddp_checks
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")

WITH_FOUR = ["no_sync_accumulates_before_the_mean", "uneven_inputs_with_join", "only_processes_of_the_same_group_agree"]
WITH_TWO = [name for name in ddp_checks.CHECKS if name != "only_processes_of_the_same_group_agree"]
if importlib.util.find_spec("accelerate") is None:
    WITH_TWO = [name for name in WITH_TWO if not name.startswith("accelerator")]


def run(folder: Path, processes: int, names: list[str]) -> dict[str, str]:
    """What came of each check: starting processes takes seconds, so those of one group run them all."""
    arguments = processes, names, str(folder / "rendezvous"), str(folder)
    with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):
        mp.spawn(ddp_checks.main, arguments, nprocs=processes)
    outcomes: dict[str, str] = {}
    for report in (folder / str(rank) for rank in range(processes)):
        for name, outcome in torch.load(report).items() if report.exists() else ():
            outcomes[name] = outcome if outcomes.get(name, "passed") == "passed" else outcomes[name]
    return outcomes


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("two"), 2, WITH_TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory: Any) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("four"), 4, WITH_FOUR)


@pytest.mark.parametrize("policy", ddp_checks.POLICIES)
@pytest.mark.parametrize("name", WITH_TWO)
def test_two_processes(two: dict[str, str], name: str, policy: str) -> None:
    assert two.get(f"{name} {policy}", "not run, after another's failure") == "passed"


@pytest.mark.parametrize("policy", ddp_checks.POLICIES)
@pytest.mark.parametrize("name", WITH_FOUR)
def test_four_processes(four: dict[str, str], name: str, policy: str) -> None:
    assert four.get(f"{name} {policy}", "not run, after another's failure") == "passed"
