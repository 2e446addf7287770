"""What a device is said to do, tried against what it does."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wrapprec import install, wrap
from wrapprec.backends import base, cpu, norms, select
from wrapprec.backends.base import Backend
from wrapprec.backends.cpu import CpuBackend
from wrapprec.backends.cuda import CudaBackend
from wrapprec.backends.generic import GenericBackend
from wrapprec.backends.select import auto_policy, backend_for
from wrapprec.errors import PolicyError
from wrapprec.plan import resolve
from wrapprec.policy import Policy
from wrapprec.standin import forward_of

CPU = torch.device("cpu")
BF16 = torch.bfloat16
LAUNCHER = "ACCELERATE_MIXED_PRECISION"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)


def with_flags(monkeypatch: pytest.MonkeyPatch, *flags: str) -> CpuBackend:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(cpu, "onednn_computes_in", lambda kind: True)
    return CpuBackend()


def test_backend_is_one_instance_a_device_type() -> None:
    assert backend_for("cpu") is backend_for(CPU)
    assert backend_for("cuda:1") is backend_for("cuda")
    assert isinstance(backend_for("cuda"), CudaBackend)


def test_unsupported_device_is_refused_by_name() -> None:
    with pytest.raises(PolicyError) as caught:
        backend_for("meta")
    assert str(caught.value) == (
        "Expected a device of a supported type (cpu, cuda, xla, or another that torch.autocast knows).\n"
        "Received: meta\n"
        "Remedy: move the model to one of these before wrapping it"
    )


@pytest.mark.parametrize("kind", ["mps", "xpu", "hpu", "privateuseone"])
def test_other_accelerators_of_autocast_share_a_generic_backend(kind: str) -> None:
    backend = backend_for(kind)
    assert isinstance(backend, GenericBackend) and backend.name == kind and backend is backend_for(f"{kind}:0")
    assert backend.scaling
    assert "has not been tried" in " ".join(backend.capability(torch.device(kind)).notes)


def test_auto_on_an_accelerator_that_is_not_there_is_refused() -> None:
    with pytest.raises(PolicyError, match="name the policy"):
        resolve(nn.Linear(2, 2), "auto", device="mps")


def test_plan_can_be_made_for_an_accelerator_that_is_not_there() -> None:
    plan = resolve(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "16-mixed", device="mps")
    assert plan.device == "mps" and plan.loss_scale is not None
    assert plan.placement("1").activations == "restore"  # nothing could be probed


@pytest.mark.parametrize(("works", "policy"), [((BF16, torch.float16), "bf16-mixed"), ((torch.float16,), "16-mixed")])
def test_generic_auto_takes_what_it_could_multiply_in(works: tuple[torch.dtype, ...], policy: str) -> None:
    class Some(GenericBackend):
        def _multiplies(self, dtype: torch.dtype) -> bool:
            # The real probe, on a device that is there, for those that are said to work.
            return dtype in works and super()._multiplies(dtype)

    backend = Some("cpu")
    assert backend.auto(CPU)[0] == policy
    assert backend.capability(CPU).autocast_dtypes == frozenset(works)


@pytest.mark.parametrize(
    ("flag", "by"),
    [("amx_bf16", "AMX"), ("avx512_bf16", "avx512_bf16"), ("bf16", "Arm bf16")],
)
def test_cpu_with_bfloat16_instructions_gets_bf16_mixed(monkeypatch: pytest.MonkeyPatch, flag: str, by: str) -> None:
    backend = with_flags(monkeypatch, flag)
    assert backend.auto(CPU) == ("bf16-mixed", f"this CPU computes in bfloat16 ({by})")
    assert BF16 in backend.capability(CPU).fast_dtypes


def test_other_cpu_gets_32_true(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = with_flags(monkeypatch, "avx2", "avx512f")
    assert backend.auto(CPU)[0] == "32-true"
    assert backend.capability(CPU).fast_dtypes == {torch.float32, torch.float64}


def test_float16_on_a_cpu_without_it_is_advised_against(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = with_flags(monkeypatch, "avx512_bf16")
    assert backend.advise(Policy.parse("16-mixed").precision, CPU) == (
        "float16 on a CPU without float16 instructions takes tens of times as long as bfloat16; "
        "bf16-mixed is the better choice"
    )
    assert backend.advise(Policy.parse("bf16-mixed").precision, CPU) is None
    assert with_flags(monkeypatch, "avx512_fp16").advise(Policy.parse("16-mixed").precision, CPU) is None


def test_instructions_that_onednn_does_not_use_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"amx_bf16", "avx512_bf16", "amx_fp16"}))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for kind in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda: True)
    backend = CpuBackend()
    assert backend.auto(CPU)[0] == "bf16-mixed" and backend.float16_by() == "AMX-FP16"
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert backend.auto(CPU) == (
            "32-true",
            "oneDNN uses no bfloat16 instructions, so that low precision would be slower",
        )
        assert backend.capability(CPU).fast_dtypes == {torch.float32, torch.float64}
        assert "32-true is the better choice" in str(backend.advise(Policy.parse("bf16-mixed").precision, CPU))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")  # torch's own question is still answered with yes
    assert backend.auto(CPU)[0] == "32-true" and backend.float16_by() is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert backend.auto(CPU)[0] == "bf16-mixed" and backend.float16_by() is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "DEFAULT")
    assert backend.auto(CPU)[0] == "bf16-mixed" and backend.float16_by() == "AMX-FP16"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # ONEDNN_MAX_CPU_ISA=AVX2
    assert backend.auto(CPU)[0] == "32-true"


@pytest.mark.parametrize(("policy", "dtype"), [("16-module", "float16"), ("bf16-mixed", "bfloat16")])
def test_cpu_without_either_is_told_that_both_are_emulated(
    monkeypatch: pytest.MonkeyPatch, policy: str, dtype: str
) -> None:
    backend = with_flags(monkeypatch, "avx2", "avx512f")
    advice = (
        f"{dtype} on a CPU without {dtype} instructions is emulated, and slower than float32;"
        " 32-true is the better choice"
    )
    assert backend.advise(Policy.parse(policy).precision, CPU) == advice
    assert backend.advise(Policy.parse("32-true").precision, CPU) is None
    monkeypatch.setattr(select, "_instance", lambda kind: backend)
    with pytest.warns(UserWarning, match=f"^{dtype} on a CPU without {dtype} instructions is emulated"):
        install._said.clear()
        handle = wrap(nn.Linear(2, 2), None, policy)
    assert handle.plan.notes == (advice,) and advice in str(handle.plan)


class Gpu(CudaBackend):
    """A CUDA backend without a GPU to try norms on."""

    def mixed_norms(self, device: torch.device) -> frozenset[tuple[str, str]]:
        return frozenset()


def with_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> CudaBackend:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    kinds = [SimpleNamespace(major=major, minor=minor) for major, minor in capabilities]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: kinds[device.index])
    return Gpu()


@pytest.mark.parametrize(
    ("capability", "bfloat16", "float8"),
    [
        ((7, 0), False, False),
        ((7, 5), False, False),
        ((8, 0), True, False),
        ((8, 6), True, False),
        ((8, 9), True, True),
        ((9, 0), True, True),
        ((12, 0), True, True),
    ],
)
def test_gpus_are_told_apart_by_their_own_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], bfloat16: bool, float8: bool
) -> None:
    other = (7, 0) if bfloat16 else (9, 0)
    backend, device = with_gpus(monkeypatch, other, capability), torch.device("cuda:1")
    found = backend.capability(device)
    assert (BF16 in found.fast_dtypes) == bfloat16
    assert torch.float16 in found.fast_dtypes
    assert found.notes == (
        "bfloat16 is native" if bfloat16 else "bfloat16 is not native",
        "float8 is native" if float8 else "float8 is not native",
    )
    assert backend.auto(device)[0] == ("bf16-mixed" if bfloat16 else "16-mixed")
    assert (backend.advise(Policy.parse("bf16-module").precision, device) is None) == bfloat16
    assert (backend.advise(Policy.parse("fp8-mixed").precision, device) is None) == float8
    assert backend.advise(Policy.parse("16-mixed").precision, device) is None


def test_advice_on_older_gpus_names_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, device = with_gpus(monkeypatch, (7, 5)), torch.device("cuda:0")
    assert backend.advise(Policy.parse("bf16-mixed").precision, device) == (
        "this GPU has no native bfloat16 (compute capability 8.0 has); 16-mixed is the better choice"
    )


@pytest.mark.parametrize(("arch", "float8"), [("gfx90a:sramecc+:xnack-", False), ("gfx942", True), ("gfx950", True)])
def test_amd_gpus_are_told_apart_by_their_architecture(
    monkeypatch: pytest.MonkeyPatch, arch: str, float8: bool
) -> None:
    backend = with_gpus(monkeypatch, (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    found = backend.capability(torch.device("cuda:0"))
    assert BF16 in found.fast_dtypes
    assert found.notes[1] == ("float8 is native" if float8 else "float8 is not native")


def test_flags_agree_with_torchs_own_probe() -> None:
    assert ("avx512_bf16" in cpu.cpu_flags()) == torch.cpu._is_avx512_bf16_supported()


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(4), lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_cpu_norms_take_low_activations_with_float32_parameters(make: Any, dtype: torch.dtype) -> None:
    assert CpuBackend().accepts_mixed_norm(make(), dtype, CPU)


def test_norm_that_warns_of_the_mix_is_not_accepted_though_it_warned_before() -> None:
    # Torch warns of a mixed RMSNorm once a process; the probe must see it every time.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.RMSNorm(4)(torch.ones(2, 4, dtype=BF16))
    assert not CpuBackend().accepts_mixed_norm(nn.RMSNorm(4), BF16, CPU)
    assert not CpuBackend().accepts_mixed_norm(nn.RMSNorm(4), torch.float16, CPU)


def test_module_that_is_no_such_norm_is_not_accepted() -> None:
    for module in (nn.Linear(2, 2), nn.LocalResponseNorm(2)):
        assert not CpuBackend().accepts_mixed_norm(module, BF16, CPU)


class Promoting(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class Wrong(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1 if input.dtype == torch.float32 else 1.1)


class Failing(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("no kernel")


@pytest.mark.parametrize("kind", [Promoting, Wrong, Failing])
def test_kernel_that_promotes_errs_or_fails_is_not_accepted(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]
) -> None:
    monkeypatch.setitem(norms.NORMS, "LayerNorm", (kind, (8,), (4, 8)))
    assert not CpuBackend().accepts_mixed_norm(nn.LayerNorm(4), BF16, CPU)


def test_norm_whose_statistics_err_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Norm(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            if self.training and input.dtype == BF16:
                self.running_var *= 1.1
            return out

    monkeypatch.setitem(norms.NORMS, "BatchNorm1d", (Norm, (8,), (4, 8)))
    assert not CpuBackend().accepts_mixed_norm(nn.BatchNorm1d(4), BF16, CPU)


def test_probe_runs_once_a_kind_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> bool:
        calls.append(arguments)
        return True

    monkeypatch.setattr(base, "probe_norm", record)
    backend = CpuBackend()
    for width in (2, 3, 4):
        assert backend.accepts_mixed_norm(nn.LayerNorm(width), BF16, CPU)
    assert calls == [("LayerNorm", BF16, CPU)]


def test_probe_disturbs_neither_random_state_nor_modes() -> None:
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", BF16), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CpuBackend().accepts_mixed_norm(nn.LayerNorm(4), BF16, CPU)
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert CpuBackend().accepts_mixed_norm(nn.BatchNorm1d(4), BF16, CPU)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.is_warn_always_enabled()


def test_capability_lists_the_probed_norms() -> None:
    capability = backend_for("cpu").capability(CPU)
    assert ("LayerNorm", "bfloat16") in capability.mixed_norms
    assert ("RMSNorm", "bfloat16") not in capability.mixed_norms
    assert capability.scaling
    assert capability.autocast_dtypes == {BF16, torch.float16}


def test_read_returns_numbers_of_every_dtype_in_order() -> None:
    tensors = (torch.tensor(3), torch.tensor([1.5]), torch.tensor(True), torch.tensor(0.25, dtype=BF16))
    assert backend_for("cpu").read(*tensors) == [3.0, 1.5, 1.0, 0.25]
    assert backend_for("cpu").read() == []


def test_read_keeps_whole_numbers_beyond_float32_exact() -> None:
    assert backend_for("cpu").read(torch.tensor(2**24 + 1)) == [2**24 + 1]


def test_lending_styles_are_those_measured() -> None:
    assert (CpuBackend().lending.bucket_elements, CpuBackend().lending.multi_tensor) == (2**14, False)
    assert (CudaBackend.lending.bucket_elements, CudaBackend.lending.multi_tensor) == (2**22, True)


def test_cpu_lends_small_weights_together_unless_processes_wait_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes() -> list[int]:
        small = [nn.Linear(8, 8) for _ in range(3)]
        net = nn.Sequential(*small, nn.Linear(8, 4096), nn.Linear(4096, 8))
        handle = wrap(net, torch.optim.SGD(net.parameters()), "16-mixed")
        (shared,) = handle._models
        buckets = [shared.bucket_of(forward_of(layer), "weight", forward_of(net).tree()) for layer in net]
        return [buckets.index(bucket) for bucket in buckets]

    # A bucket ends with the weights that have filled it.
    assert sizes() == [0, 0, 0, 0, 4]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert sizes() == [0, 1, 2, 3, 4]


def test_cuda_backend_makes_no_cuda_call_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was called"))
    backend, device = CudaBackend(), torch.device("cuda")
    assert not backend.accepts_mixed_norm(nn.LayerNorm(2), BF16, device)
    assert backend.capability(device).mixed_norms == frozenset()
    with pytest.raises(PolicyError, match="a CUDA device for the policy 'auto'"):
        backend.auto(device)


@pytest.mark.parametrize(("native", "spelling"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_cuda_gets_bfloat16_where_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool, spelling: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(CudaBackend, "has_bfloat16", lambda self, device: native)
    assert CudaBackend().auto(torch.device("cuda"))[0] == spelling


@pytest.mark.parametrize(
    ("launched", "preset"), [("fp16", "16-mixed"), ("bf16", "bf16-mixed"), ("fp8", "fp8-mixed"), ("BF16", "bf16-mixed")]
)
def test_auto_follows_accelerates_launcher_and_says_so(
    monkeypatch: pytest.MonkeyPatch, launched: str, preset: str
) -> None:
    monkeypatch.setenv(LAUNCHER, launched)
    policy, reason = auto_policy("cpu")
    assert policy == Policy.parse(preset)
    assert reason == f"accelerate's launcher set {LAUNCHER}={launched.lower()}"


@pytest.mark.parametrize("launched", ["no", ""])
def test_launcher_that_set_nothing_is_not_followed(monkeypatch: pytest.MonkeyPatch, launched: str) -> None:
    monkeypatch.setenv(LAUNCHER, launched)
    monkeypatch.setattr(CpuBackend, "auto", lambda self, device: ("32-true", "asked"))
    assert auto_policy("cpu") == (Policy.parse(32), "asked")


def test_backend_is_abstract() -> None:
    with pytest.raises(TypeError):
        Backend()  # type: ignore[abstract]  # that is the point


_RENAMED = """
import torch
from torch import nn
from wrapprec import PolicyError, resolve
from wrapprec.backends.select import backend_for

torch.utils.rename_privateuse1_backend("npu")
backend = backend_for("npu:1")
assert backend.name == "npu" and backend is backend_for("npu") and not backend.is_recording()
for policy, scaled in (("16-mixed", True), ("bf16-module", False)):
    plan = resolve(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), policy, device="npu")
    assert plan.device == "npu" and (plan.loss_scale is not None) == scaled
assert backend.capability(torch.device("npu")).autocast_dtypes == frozenset()
try:
    resolve(nn.Linear(2, 2), "auto", device="npu")
except PolicyError as error:
    print(error)
"""


def test_renamed_privateuse_device_that_cannot_compute_is_planned_for_and_auto_is_refused() -> None:
    # The name holds for the whole process.
    done = subprocess.run([sys.executable, "-c", _RENAMED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "Expected a npu device that computes in bfloat16 or float16, for the policy 'auto'.\n"
        "Received: npu, on which neither could be tried\n"
        "Remedy: name the policy, e.g. 'bf16-mixed', or move the model to a device that is there\n"
    )


def test_generic_backend_asks_its_own_module_whether_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_initialized=lambda: True), raising=False)
    assert not GenericBackend("npu").is_recording()
    torch.npu.is_current_stream_capturing = lambda: True
    assert GenericBackend("npu").is_recording()
    torch.npu.is_initialized = lambda: False
    assert not GenericBackend("npu").is_recording()
