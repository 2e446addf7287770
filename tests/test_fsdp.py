"""Models under fully_shard and tensor parallelism: two and four real processes, which run what is in `fsdp_checks`."""

from __future__ import annotations

from typing import Any

import ddp_checks
import fsdp_checks
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")

WITH_FOUR: list[str] = []
WITH_TWO = [name for name in fsdp_checks.CHECKS if name not in WITH_FOUR]


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> dict[str, str]:
    return ddp_checks.run(tmp_path_factory.mktemp("two"), 2, WITH_TWO, fsdp_checks.CHECKS)


@pytest.mark.parametrize("policy", ddp_checks.POLICIES)
@pytest.mark.parametrize("name", WITH_TWO)
def test_two_processes(two: dict[str, str], name: str, policy: str) -> None:
    assert two.get(f"{name} {policy}", "not run, after another's failure") == "passed"
