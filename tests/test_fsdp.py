"""Models under fully_shard and tensor parallelism: two and four real processes, which run what is in `fsdp_checks`."""

from __future__ import annotations

from typing import Any

import ddp_checks
import pytest
import torch
import torch.distributed as dist

import wrapprec

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
if dist.is_available():
    import fsdp_checks

WITH_FOUR = [
    "hybrid_mesh_has_true_gradients_and_skips_everywhere",
    "tensor_parallel_blocks_can_be_sharded",
]
WITH_TWO = [name for name in fsdp_checks.CHECKS if name not in WITH_FOUR]


def cases(names: list[str]) -> list[tuple[str, str]]:
    return [(name, policy) for name in names for policy in ddp_checks.policies_of(fsdp_checks.CHECKS[name])]


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> dict[str, str]:
    return ddp_checks.run(tmp_path_factory.mktemp("two"), 2, WITH_TWO, fsdp_checks.CHECKS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: Any) -> dict[str, str]:
    return ddp_checks.run(tmp_path_factory.mktemp("four"), 4, WITH_FOUR, fsdp_checks.CHECKS)


@pytest.mark.parametrize(("name", "policy"), cases(WITH_TWO))
def test_two_processes(two: dict[str, str], name: str, policy: str) -> None:
    assert two.get(f"{name} {policy}", "not run, after another's failure") == "passed"


@pytest.mark.parametrize(("name", "policy"), cases(WITH_FOUR))
def test_four_processes(four: dict[str, str], name: str, policy: str) -> None:
    assert four.get(f"{name} {policy}", "not run, after another's failure") == "passed"


@pytest.mark.parametrize(
    ("policy", "param", "reduce"),
    [
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("O1", torch.float16, torch.float32),
        (16, torch.float16, torch.float32),
        ("16-module", torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        ("p=f32,c=bf16,o=f32", torch.bfloat16, torch.float32),
        ("16-true", torch.float16, torch.float32),
        ("32-true", None, None),
        ("32-fast", None, None),
        ("64-true", None, None),
    ],
)
def test_fsdp_policy_sends_in_the_compute_dtype_and_reduces_in_float32(policy: Any, param: Any, reduce: Any) -> None:
    told = wrapprec.fsdp_policy(policy)
    assert (told.param_dtype, told.reduce_dtype) == (param, reduce)
    assert told.output_dtype is None
    assert not told.cast_forward_inputs


@pytest.mark.parametrize("policy", ["nf4", "int8", "fp8-mixed"])
def test_fsdp_policy_refuses_weights_that_fsdp_cannot_send(policy: str) -> None:
    with pytest.raises(wrapprec.PolicyError, match="Expected a policy whose weights are sent in float32") as error:
        wrapprec.fsdp_policy(policy)
    assert f"Received: '{policy}', which stores them in" in str(error.value)
    assert "use bf16-mixed or 16-mixed with fully_shard" in str(error.value)
