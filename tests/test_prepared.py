"""Accelerators and transformers' Trainer on two real processes, which run what is in `prepared_checks`."""

from __future__ import annotations

import importlib.util
from typing import Any

import ddp_checks
import pytest
import torch.distributed as dist

missing = [name for name in ("accelerate", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing) or not dist.is_available(), reason=f"{missing} or torch's distributed")
if dist.is_available():
    import prepared_checks


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> dict[str, str]:
    return ddp_checks.run(tmp_path_factory.mktemp("two"), 2, list(prepared_checks.CHECKS), prepared_checks.CHECKS)


CASES = [(name, policy) for name, one in prepared_checks.CHECKS.items() for policy in ddp_checks.policies_of(one)]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_two_processes(two: dict[str, str], name: str, policy: str) -> None:
    assert two.get(f"{name} {policy}", "not run, after another's failure") == "passed"
