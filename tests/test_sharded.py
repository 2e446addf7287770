"""Sharded models beside `test_fsdp`: two and four real processes, which run what is in `sharded_checks`."""

from __future__ import annotations

import importlib.util
from typing import Any

import ddp_checks
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
if dist.is_available():
    import sharded_checks

NEEDS = {
    "optimizer_state_of_few_bits_is_torchaos": "torchao",
    "tied_language_models_have_true_gradients": "transformers",
    "weight_formats_are_refused": "bitsandbytes",
    "tensor_parallel_weights_are_neither_converted_nor_quantised": "bitsandbytes",
}
WITH_FOUR = ["state_saved_by_two_processes_is_loaded_by_four_and_by_one"]
HERE = [name for name in sharded_checks.CHECKS if importlib.util.find_spec(NEEDS.get(name, "torch")) is not None]
WITH_TWO = [name for name in HERE if name not in WITH_FOUR]


def cases(names: list[str]) -> list[tuple[str, str]]:
    return [(name, policy) for name in names for policy in ddp_checks.policies_of(sharded_checks.CHECKS[name])]


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> dict[str, str]:
    return ddp_checks.run(tmp_path_factory.mktemp("two"), 2, WITH_TWO, sharded_checks.CHECKS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: Any) -> dict[str, str]:
    return ddp_checks.run(tmp_path_factory.mktemp("four"), 4, WITH_FOUR, sharded_checks.CHECKS)


@pytest.mark.parametrize(("name", "policy"), cases(WITH_TWO))
def test_two_processes(two: dict[str, str], name: str, policy: str) -> None:
    assert two.get(f"{name} {policy}", "not run, after another's failure") == "passed"


@pytest.mark.parametrize(("name", "policy"), cases(WITH_FOUR))
def test_four_processes(four: dict[str, str], name: str, policy: str) -> None:
    assert four.get(f"{name} {policy}", "not run, after another's failure") == "passed"
