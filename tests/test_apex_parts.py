"""Apex's optimizers, parallel wrappers and older tools: torch's own in their place, or a refusal with the remedy."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec
from wrapprec.migrate.apex import amp, fp16_utils, multi_tensor_apply, normalization, notes, optimizers, parallel
from wrapprec.migrate.apex.session import session

# The kernels of torch's fused optimizers and its plain loops differ in the order of a few float32 operations.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    session.calls, session.enabled = [], None
    notes._said.clear()
    yield
    session.calls, session.enabled = [], None


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def _assert_trains_alike(mine: Any, theirs: Any, **options: Any) -> None:
    one, two = _model(), _model()
    got, want = _train(one, mine(one.parameters(), **options)), _train(two, theirs(two.parameters()))
    torch.testing.assert_close(got, want, **CLOSE)


# Optimizers


def test_fused_adam_is_adamw_with_the_defaults_of_apex() -> None:
    torch_adamw = torch.optim.AdamW
    _assert_trains_alike(optimizers.FusedAdam, lambda p: torch_adamw(p, lr=1e-3, weight_decay=0.0))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.9), "eps": 1e-3}
    _assert_trains_alike(optimizers.FusedAdam, lambda p: torch_adamw(p, **options), **options)
    _assert_trains_alike(
        optimizers.FusedAdam, lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5), lr=0.1, weight_decay=0.5,
        adam_w_mode=False,
    )  # fmt: skip


def test_fused_sgd_and_adagrad_are_those_of_torch() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    _assert_trains_alike(optimizers.FusedSGD, lambda p: torch.optim.SGD(p, **options), **options)
    damped: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    _assert_trains_alike(optimizers.FusedSGD, lambda p: torch.optim.SGD(p, **damped), **damped)
    options = {"lr": 0.1, "weight_decay": 0.1}
    _assert_trains_alike(optimizers.FusedAdagrad, lambda p: torch.optim.Adagrad(p, **options), **options)


def test_groups_of_fused_optimizers_keep_their_own_settings() -> None:
    model = _model()
    groups = [{"params": model[0].weight, "lr": 0.5}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    optimizer = optimizers.FusedAdam(groups, lr=0.1)
    assert [(g["lr"], g["weight_decay"], g["fused"], len(g["params"])) for g in optimizer.param_groups] == [
        (0.5, 0.0, True, 1),
        (0.1, 0.1, True, 2),
    ]


@pytest.mark.parametrize(("options", "left"), [({}, "zeros"), ({"set_grad_none": True}, None)])
def test_fused_sgd_zeroes_gradients_as_apex_does(options: dict[str, Any], left: Any) -> None:
    model = _model()
    optimizer = optimizers.FusedSGD(model.parameters(), lr=0.1, **options)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.zero_grad()
    found = [param.grad for param in model.parameters()]
    assert all(grad is None for grad in found) if left is None else not any(g.any() for g in found)
    optimizer.zero_grad(set_to_none=True)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("name", ["FusedAdam", "FusedSGD"])
def test_fused_optimizers_skip_an_overflowed_step_under_amp(name: str) -> None:
    model = _model()
    model, optimizer = amp.initialize(model, getattr(optimizers, name)(model.parameters(), lr=0.1), verbosity=0)
    before = [param.detach().clone() for param in model.parameters()]
    with amp.scale_loss(model(torch.ones(1, 4)).sum() * 1e6, optimizer) as scaled:
        scaled.backward()
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    with amp.scale_loss(model(torch.ones(1, 4)).mean() * 1e-2, optimizer) as scaled:
        optimizer.zero_grad()
        scaled.backward()
    optimizer.step()
    assert not any(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def _apex_checkpoint(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What Apex's FusedAdam would have saved here: one step count for a group, and its own settings."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["step"] = int(state["state"][group["params"][0]]["step"])
        for key in group.keys() - {"lr", "betas", "eps", "weight_decay", "params", "step"}:
            del group[key]
        group["bias_correction"] = True
    for entry in state["state"].values():
        del entry["step"]
    return state


def test_checkpoint_of_apex_fused_adam_resumes() -> None:
    model = _model()
    optimizer = optimizers.FusedAdam(model.parameters(), lr=0.1, weight_decay=0.1)
    _train(model, optimizer)
    other = copy.deepcopy(model)
    resumed = optimizers.FusedAdam(other.parameters(), lr=0.3)
    resumed.load_state_dict(_apex_checkpoint(optimizer))
    assert resumed.param_groups[0]["fused"] is True
    torch.testing.assert_close(_train(other, resumed), _train(model, optimizer), rtol=0, atol=0)
    resumed.load_state_dict(optimizer.state_dict())  # torch's own form
    with pytest.raises(ValueError, match="different number of parameter groups"):
        resumed.load_state_dict({"state": {}, "param_groups": []})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FusedAdam", {"eps_inside_sqrt": True}),
        ("FusedAdam", {"amsgrad": True}),
        ("FusedSGD", {"lr": 0.1, "wd_after_momentum": True}),
        ("FusedAdagrad", {"adagrad_w_mode": True}),
        ("FusedLAMB", {"adam_w_mode": False}),
    ],
)
def test_arguments_without_a_counterpart_are_refused(name: str, options: dict[str, Any]) -> None:
    key = [*options][-1]
    with pytest.raises(wrapprec.WrapprecError) as raised:
        getattr(optimizers, name)(_model().parameters(), **options)
    text = str(raised.value)
    assert f"apex.optimizers.{name}" in text and f"Received: {key}={options[key]!r}" in text and "leave" in text


def _has_timm() -> bool:
    try:
        importlib.import_module("timm.optim")
    except ImportError:
        return False
    return True


def _lamb_by_hand(params: list[Tensor], grads: list[list[Tensor]], lr: float, decay: float, most: float) -> None:
    """LAMB (You et al. 2020, algorithm 2) with the clipping by the global norm of Apex's kernel."""
    first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step, given in enumerate(grads, start=1):
        norm = math.sqrt(sum(float(g.square().sum()) for g in given))
        clip = max(1.0, norm / most)
        for p, g, m, v in zip(params, given, first, second, strict=True):
            g = g / clip
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g.square(), alpha=0.001)
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + decay * p
            ratio = p.norm() / update.norm() if decay and p.norm() > 0 and update.norm() > 0 else 1.0
            p.sub_(lr * ratio * update)


@pytest.mark.skipif(not _has_timm(), reason="needs timm")
@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_fused_lamb_computes_the_formula(decay: float) -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    other = [param.detach().clone() for param in mine]
    grads = [[torch.randn_like(param) for param in mine] for _ in range(3)]
    optimizer = optimizers.FusedLAMB(mine, lr=0.1, weight_decay=decay)
    for given in grads:
        for param, grad in zip(mine, given, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    _lamb_by_hand(other, grads, 0.1, decay, 1.0)
    torch.testing.assert_close([param.detach() for param in mine], other, **CLOSE)
    assert type(optimizer).__name__ == "FusedLAMB"
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.skipif(_has_timm(), reason="timm is there")
def test_fused_lamb_without_timm_names_the_extra() -> None:
    with pytest.raises(wrapprec.WrapprecError, match=r"pip install 'wrapprec\[apex\]'"):
        optimizers.FusedLAMB(_model().parameters())


def test_notes_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        optimizers.FusedAdam(_model().parameters())
    assert capsys.readouterr().err == "wrapprec: apex.optimizers.FusedAdam is torch.optim.AdamW(fused=True)\n"


# Parallel


@pytest.fixture
def _group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("first", [True, False])
def test_ddp_of_apex_is_that_of_torch_before_and_after_initialize(first: bool) -> None:
    plain = _model()
    want = _train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    model: Any = _model()
    if first:
        model = parallel.DistributedDataParallel(model, delay_allreduce=False, message_size=2**20)
    model, optimizer = amp.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), verbosity=0)
    if not first:
        model = parallel.DistributedDataParallel(model)
    assert isinstance(model, nn.parallel.DistributedDataParallel) and not model.broadcast_buffers
    got = _train(model, optimizer)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)  # three steps of float16
    model.disable_allreduce()
    assert not model.require_backward_grad_sync
    model.enable_allreduce()
    assert model.require_backward_grad_sync


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_group")
def test_delayed_allreduce_takes_parameters_that_are_not_used() -> None:
    model = parallel.DistributedDataParallel(_Unused(), delay_allreduce=True)
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
    assert model.module.unused.weight.grad is None


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"gradient_average": False}, "multiply the loss by the number of processes"),
        ({"retain_allreduce_buffers": True}, "read each parameter's .grad"),
        ({"shared_param": True}, "shared parameters are found"),
        ({"allreduce_communicators": ([], [])}, "process_group"),
    ],
)
def test_arguments_of_ddp_without_a_counterpart_are_refused(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(wrapprec.WrapprecError) as raised:
        parallel.DistributedDataParallel(_model(), **options)
    assert remedy in str(raised.value) and next(iter(options)) in str(raised.value)
    kept = {"allreduce_trigger_params": [1], "num_allreduce_streams": 2, "gradient_predivide_factor": 2.0}
    parallel.DistributedDataParallel(_model(), allreduce_always_fp32=True, **kept)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_group")
def test_batch_normalisation_is_synchronised_by_torch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.5), nn.BatchNorm1d(4))
    model[1].weight.data.fill_(3.0)
    weight = model[1].weight
    converted: Any = parallel.convert_syncbn_model(model)
    assert [type(layer).__name__ for layer in converted] == ["Conv2d", "SyncBatchNorm", "SyncBatchNorm"]
    assert converted[1].weight is weight and converted[1].eps == 0.5
    layer = parallel.SyncBatchNorm(4, 0.25, 0.5, False)
    assert isinstance(layer, nn.SyncBatchNorm) and (layer.eps, layer.momentum, layer.affine) == (0.25, 0.5, False)
    assert parallel.create_syncbn_process_group(0) is None
    assert parallel.create_syncbn_process_group(1) is not None
    with pytest.raises(wrapprec.WrapprecError, match="fuse_relu=True"):
        parallel.SyncBatchNorm(4, fuse_relu=True)


# The rest


def test_fused_normalisation_is_that_of_torch() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(normalization.FusedLayerNorm(4)(x), nn.LayerNorm(4)(x))
    assert torch.equal(normalization.FusedRMSNorm(4)(x), nn.RMSNorm(4, eps=1e-5)(x))
    plan = wrapprec.resolve(nn.Sequential(normalization.MixedFusedLayerNorm(4)), "bf16-mixed")
    assert plan.placements[1].precision.compute_dtype is torch.float32


@pytest.mark.parametrize(
    ("module", "name", "remedy"),
    [
        (optimizers, "FusedNovoGrad", r"torch\.optim\.AdamW"),
        (optimizers, "FusedMixedPrecisionLamb", "FusedLAMB"),
        (multi_tensor_apply, "multi_tensor_applier", "torch._foreach_"),
    ],
)
def test_what_has_no_counterpart_imports_and_refuses_with_a_remedy(module: Any, name: str, remedy: str) -> None:
    assert name in module.__all__
    with pytest.raises(wrapprec.WrapprecError, match=remedy):
        getattr(module, name)(_model())


def test_every_name_of_a_module_is_there() -> None:
    for module in (amp, fp16_utils, multi_tensor_apply, normalization, optimizers, parallel):
        assert all(hasattr(module, name) for name in module.__all__)
    assert fp16_utils.to_python_float(torch.tensor([2.0])) == 2.0 == fp16_utils.to_python_float([2.0])
    assert multi_tensor_apply.multi_tensor_applier.available is False


def _larc_by_hand(clip: bool, decay: float) -> list[Tensor]:
    """LARC's steps (arXiv:1708.03888) with plain SGD, as formulas."""
    model = _model()
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        with torch.no_grad():
            for param in model.parameters():
                assert param.grad is not None
                size, slope = param.norm(), param.grad.norm()
                rate = 0.01 * size / (slope + decay * size + 1e-8)
                rate = min(rate / 0.05, torch.tensor(1.0)) if clip else rate
                param -= 0.05 * rate * (param.grad + decay * param)
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("clip", [True, False])
def test_larc_is_its_formula_and_leaves_weight_decay_in_the_groups(clip: bool) -> None:
    model = _model()
    inner = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = parallel.LARC(optimizer=inner, trust_coefficient=0.01, clip=clip)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    for param, want in zip(model.parameters(), _larc_by_hand(clip, 0.1), strict=True):
        assert torch.allclose(param, want, rtol=1e-6)  # the same operations in float32, in another order
    assert optimizer.param_groups is inner.param_groups and inner.param_groups[0]["weight_decay"] == 0.1
    optimizer.load_state_dict(inner.state_dict())
    assert optimizer.state is inner.state


def test_larc_under_amp_steps_as_in_float32_and_skips_an_overflow() -> None:
    session.calls, session.enabled = [], None
    model = _model()
    inner = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = parallel.LARC(inner, trust_coefficient=0.01, clip=False)
    model, optimizer = amp.initialize(model, optimizer, opt_level="O1", loss_scale=64.0, verbosity=0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for factor in (1.0, 1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        with amp.scale_loss(model(torch.ones(2, 4)).square().sum() * factor, optimizer) as loss:
            loss.backward()
        optimizer.step()
        scheduler.step()
    for param, want in zip(model.parameters(), _larc_by_hand(False, 0.1), strict=True):
        assert torch.allclose(param, want, rtol=2e-3)  # gradients of 11 bits, in a step of 1% of the weights
    handle = wrapprec.handle_of(model)
    assert handle is not None and handle.skipped_steps == 1
    session.calls, session.enabled = [], None


def test_adam_without_bias_correction_is_its_formula_also_resumed() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    options: dict[str, Any] = {"lr": 0.1, "bias_correction": False, "weight_decay": 0.01, "max_grad_norm": 1.5}
    optimizer = optimizers.FusedAdam([weight], **options)
    want, mean, square = weight.detach().double(), torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(4):
        grad = torch.tensor([0.5, -1.0]).double() * (step + 1)
        weight.grad = grad.float()
        optimizer.step()
        grad = grad * min(1.5 / (float(grad.norm()) + 1e-6), 1.0)
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        want = want - 0.1 * (mean / (square.sqrt() + 1e-8) + 0.01 * want)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = optimizers.FusedAdam([weight], **options)
        optimizer.load_state_dict(saved)
    assert torch.allclose(weight.double(), want, rtol=1e-5)  # float32 against float64


def test_first_steps_without_bias_correction_that_apex_saved_go_on_without() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = optimizers.FusedAdam([weight], lr=1.0, bias_correction=False)
    moments = {"exp_avg": torch.tensor([0.5]), "exp_avg_sq": torch.tensor([0.25])}
    group = {"params": [0], "lr": 1.0, "bias_correction": False, "step": 1}
    optimizer.load_state_dict({"state": {0: moments}, "param_groups": [group]})
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(-0.9 * 0.5 / (0.999 * 0.25) ** 0.5, rel=1e-5)
