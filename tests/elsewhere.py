"""What of the core's tests runs on an XLA device (`pytest --device xla`), and the reason for everything that does not.

One table says which files are the core's, three what is left out of it: whole files, single tests, and what torch_xla
itself refuses, by its words. Besides, a test ends at the moment it wraps in float16. `test_xla.py` has what is XLA's
own, compiled as a training loop is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

CORE = (
    "allowlist boundary bucket calls carried cast closure copies dtypes edited_weights errors fills frozen gradients"
    " handle hooks install island layers lent mismatch modes operands optimizers plan policy region resume scale scope"
    " transforms undo weights wrap"
)
"""The files that run there, without `test_` and `.py`."""

FILES = {
    "no loss scale on XLA, which these are about": "audit diagnose leaks overflow schedulers step verdict",
    "chooses the device itself, and is about that": "backends cuda fast recording xla",
    "processes of their own, which compute on the CPU": "ddp examples docs import",
    "nn.DataParallel is for CUDA; here it is simulated by threads on the CPU": "replicas",
    "compiles or exports; what openxla compiles is in test_xla.py": "capture compile traced",
    "torch.utils.checkpoint knows no XLA; torch_xla's own is in test_xla.py": "checkpointing",
    "torch_xla 2.9 ends the process in its GRU, a scan, op by op; an LSTM is in test_xla.py": "recurrent",
    "torch_xla 2.9 ends the process where several threads compile": "threads",
    "looks at which of the CPU's attention kernels runs": "attention",
    "moves tensors between the host and the device": "offload",
    "needs hundreds of programs: too slow where each is compiled": "generate long_runs random_programs zoo",
}
"""Reasons, and the files of the core; all others are tools, or about optional packages."""

TESTS = {
    "asks for a loss scale, and reads it": "gradients::test_one_backward_through_two_forwards_under_two_scales_is_true",
    "tells the CPU's own autocast": "island::test_islands_nest_end_with_an_exception_and_leave_autocast_as_it_was"
    " region::test_autocast_outside_is_as_before_and_the_plan_wins_over_the_users"
    " region::test_autocast_of_the_user_inside_forward_is_honoured",
    "XLA's tensors have no addresses": "scope::test_weights_are_lent_only_where_they_must_be",
    "waits for an error that XLA does not raise: it takes operands of two dtypes, and any index": "frozen::test_an"
    "_exception_inside_ends_it calls::test_users_plain_function_is_true_or_refused_as_under_autocast"
    " mismatch::test_dtype_error_names_module_placement_and_rule_and_keeps_its_cause"
    " mismatch::test_rule_that_decided_is_named mismatch::test_nothing_is_explained_in_a_float32_model"
    " operands::test_torch_itself_refuses_the_mask_under_autocast operands::test_error_leaves_no_mode_behind"
    " operands::test_what_is_not_foreseen_is_an_error_that_names_the_module_and_the_rule_that_helps"
    " weights::test_weight_of_a_child_that_a_rule_keeps_in_float32_works_or_is_refused",
    "counts what runs under a function mode; the default device is one": "modes::test_flops_are_counted_as_on_the_plain"
    "_model operands::test_only_the_code_of_the_module_itself_runs_under_the_mode"
    " operands::test_mode_of_the_user_stays_on_for_the_modules_that_it_is_around",
    "the XLA compiler for CPUs rounds more often than the tolerance allows; test_xla.py has its own": "gradients::test"
    "_encoder_shared_by_two_models_is_true",
    "asks for quantised weights, which XLA has not": "wrap::test_a_policy_that_does_not_fit_changes_nothing",
    "compares with the GradScaler of torch, which is not made for XLA, and once did not grow here": "scale::test_scale"
    "_follows_grad_scaler_when_there_is_no_bound_and_no_hysteresis",
    "needs the numbers that the CPU draws": "weights::test_embedding_renormalises_its_weight_in_float32",
    "compares with the plan for a CPU": "plan::test_torch_norm_keeps_activations_and_begins_no_region"
    " plan::test_without_low_precision_the_defaults_do_not_apply plan::test_roots_are_where_the_precision_changes"
    " plan::test_auto_says_why plan::test_model_partly_on_meta_takes_the_device_of_the_rest"
    " plan::test_table_shows_every_module_and_what_decided",
}
"""Reasons, and the functions (`file::function`)."""

REFUSED = {
    "module 'torch' has no attribute 'xla'": "torch.utils.checkpoint knows no XLA; torch_xla's own is in test_xla.py",
    "Cannot set version_counter for inference tensor": "torch_xla has no linear layers in inference mode",
    "SparseXLA": "XLA has no sparse tensors",
    "`fused=True` requires": "torch itself refuses fused optimizers on XLA",
    "for outputs with complex dtype": "torch_xla has no gradients of complex numbers",
    "an autograd kernel was not registered": "torch_xla has no gradient of this operation",
    "mixed precision is disallowed": "torch_xla does not promote operands of different dtypes here",
    "The size of mean should be compatible": "torch_xla has no backward of a BatchNorm in eval mode",
    "Error while lowering": "torch_xla has no program for this operation",
    "Unrecognized tensor type ID: ZeroTensor": "torch_xla has no tangents that are zero",
    "INTERNAL ASSERT FAILED": "torch_xla fails by itself",
}
"""What torch_xla says when it cannot, and what that means. Wrong numbers are never among it."""


def start_xla() -> None:
    """Make tensors on the XLA device, and compile each operation by itself: programs of tests never come again."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch_xla
    import torch_xla.experimental

    torch_xla.experimental.eager_mode(True)
    torch.set_default_device(torch_xla.device())
    seed_host = torch.manual_seed

    def manual_seed(seed: int) -> torch.Generator:
        torch_xla.manual_seed(seed)
        return seed_host(seed)

    # As on CUDA devices: one call seeds them all.
    torch.manual_seed = manual_seed

    from wrapprec.backends.xla import XlaBackend

    advise = XlaBackend.advise

    def skip_float16(backend: XlaBackend, precision: Any, device: torch.device) -> None:
        if advise(backend, precision, device) is not None:
            pytest.skip("asks for float16, of which XLA makes bfloat16, without a loss scale")

    XlaBackend.advise = skip_float16  # type: ignore[method-assign]


def is_left_out(path: Path) -> bool:
    """Say whether a file is not read at all on XLA."""
    return path.suffix == ".py" and path.stem.removeprefix("test_") not in CORE.split()


def left_out() -> list[str]:
    """Say which files of the core are left out, and why, in lines."""
    return [f"not on XLA: {names}: {reason}" for reason, names in FILES.items()]


def skip_on_xla(items: list[pytest.Item]) -> None:
    """Skip the tests that a table has a reason against."""
    tests = {name: reason for reason, names in TESTS.items() for name in names.split()}
    for item in items:
        name = f"{item.path.stem.removeprefix('test_')}::{getattr(item, 'originalname', item.name)}"
        if name in tests:
            item.add_marker(pytest.mark.skip(reason=tests[name]))


def refused_by_xla(error: BaseException) -> str | None:
    """The reason why torch_xla cannot run a test, where its error says so."""
    text = str(error)
    return next((reason for words, reason in REFUSED.items() if words in text), None)
