"""Models under DistributedDataParallel: two and four real processes, which run what is in `ddp_checks`."""

from __future__ import annotations

import importlib.util
from typing import Any

import ddp_checks
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")

WITH_FOUR = ["no_sync_accumulates_before_the_mean", "uneven_inputs_with_join", "only_processes_of_the_same_group_agree"]
WITH_TWO = [name for name in ddp_checks.CHECKS if name != "only_processes_of_the_same_group_agree"]
if importlib.util.find_spec("accelerate") is None:
    WITH_TWO = [name for name in WITH_TWO if not name.startswith("accelerator")]
if importlib.util.find_spec("torchao") is None:
    WITH_TWO = [name for name in WITH_TWO if not name.startswith("fp8")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> dict[str, str]:
    return ddp_checks.run(tmp_path_factory.mktemp("two"), 2, WITH_TWO, ddp_checks.CHECKS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: Any) -> dict[str, str]:
    return ddp_checks.run(tmp_path_factory.mktemp("four"), 4, WITH_FOUR, ddp_checks.CHECKS)


@pytest.mark.parametrize("policy", ddp_checks.POLICIES)
@pytest.mark.parametrize("name", WITH_TWO)
def test_two_processes(two: dict[str, str], name: str, policy: str) -> None:
    assert two.get(f"{name} {policy}", "not run, after another's failure") == "passed"


@pytest.mark.parametrize("policy", ddp_checks.POLICIES)
@pytest.mark.parametrize("name", WITH_FOUR)
def test_four_processes(four: dict[str, str], name: str, policy: str) -> None:
    assert four.get(f"{name} {policy}", "not run, after another's failure") == "passed"
