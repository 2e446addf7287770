"""Scripts of Apex before `amp`: float16 weights, float32 copies and `FP16_Optimizer` train as float32 by hand does."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wrapprec
from wrapprec.migrate.apex import fp16_utils, optimizers
from wrapprec.migrate.apex.fp16_utils import FP16_Optimizer

STEPS = 6


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 3, 6, 6), torch.randint(0, 4, (16,))


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3)


def _float32_curve(max_norm: float | None = None, micro: int = 1) -> list[float]:
    """The loop in float32, written out by hand."""
    net, (x, y) = _net(), _data()
    optimizer = _sgd(net.parameters())
    curve = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(micro):
            loss = F.cross_entropy(net(x), y)
            (loss / micro).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        curve.append(loss.item())
    return curve


# float16 keeps 11 bits of weights, activations and outputs, over a few layers and steps one after another.
NEAR: dict[str, float] = {"rel": 0.01, "abs": 0.005}


def test_loop_with_copies_by_hand_follows_float32() -> None:
    net, (x, y) = fp16_utils.network_to_half(_net()), _data()
    model_params, master_params = fp16_utils.prep_param_lists(net)
    optimizer, curve = _sgd(master_params), []
    for _ in range(STEPS):
        loss = F.cross_entropy(net(x), y)
        net.zero_grad()
        (loss * 64.0).backward()
        fp16_utils.model_grads_to_master_grads(model_params, master_params)
        for param in master_params:
            assert param.grad is not None
            param.grad.data = param.grad.data / 64.0
        fp16_utils.clip_grad_norm(master_params, 0.5)
        optimizer.step()
        fp16_utils.master_params_to_model_params(model_params, master_params)
        curve.append(fp16_utils.to_python_float(loss.detach()))
    want = _float32_curve(max_norm=0.5)
    assert curve == pytest.approx(want, **NEAR) and want[-1] < 0.8 * want[0]
    assert {p.dtype for p in net.parameters()} == {torch.float16, torch.float32}, "batch normalisation is float32"
    assert torch.equal(model_params[0], master_params[0].half()) and next(iter(net.state_dict())) == "1.0.weight"


def test_flat_copy_trains_to_the_same_weights_as_single_ones() -> None:
    ends = []
    for flat in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).half()
        model_params, master_params = fp16_utils.prep_param_lists(net, flat_master=flat)
        assert len(master_params) == (1 if flat else 4)
        optimizer = _sgd(master_params)
        for _ in range(3):
            net.zero_grad()
            net(torch.ones(4, 6).half()).float().square().mean().backward()
            fp16_utils.model_grads_to_master_grads(model_params, master_params, flat_master=flat)
            optimizer.step()
            fp16_utils.master_params_to_model_params(model_params, master_params, flat_master=flat)
        ends.append([param.clone() for param in net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    with pytest.raises(wrapprec.WrapprecError, match=r"Received: torch\.float16 and torch\.float32\n.*without flat"):
        fp16_utils.prep_param_lists(fp16_utils.network_to_half(_net()), flat_master=True)


@pytest.mark.parametrize("home", [fp16_utils, optimizers])
@pytest.mark.parametrize("options", [{"static_loss_scale": 128.0}, {"dynamic_loss_scale": True}])
def test_fp16_optimizer_follows_float32_with_clipping_and_accumulation(home: Any, options: dict[str, Any]) -> None:
    net, (x, y) = fp16_utils.network_to_half(_net()), _data()
    if "dynamic_loss_scale" in options:  # so low that no step is skipped
        options = {**options, "dynamic_loss_args": {"init_scale": 256.0, "scale_window": 3}}
    optimizer = home.FP16_Optimizer(_sgd(net.parameters()), **options)
    curve, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(2):
            loss = F.cross_entropy(net(x), y)
            optimizer.backward(loss / 2)
        norms.append(float(optimizer.clip_master_grads(0.5)))
        optimizer.step()
        curve.append(loss.item())
    assert curve == pytest.approx(_float32_curve(max_norm=0.5, micro=2), **NEAR)
    assert all(0.01 < norm < 50 for norm in norms), "the norm is that of true gradients"
    assert optimizer.loss_scale == (128.0 if "static_loss_scale" in options else 1024.0)


def test_overflow_skips_the_step_and_lowers_only_a_dynamic_scale(capsys: pytest.CaptureFixture[str]) -> None:
    for dynamic in (True, False):
        net = nn.Linear(2, 1).half()
        optimizer = FP16_Optimizer(_sgd(net.parameters()), 2.0**16, dynamic, {"init_scale": 2.0**16})
        before = net.weight.detach().clone()
        optimizer.backward(net(torch.full((1, 2), 100.0).half()).sum())
        assert optimizer.overflow and optimizer.clip_master_grads(1.0) == -1
        optimizer.step()
        assert torch.equal(net.weight, before) and "OVERFLOW" in capsys.readouterr().out
        assert optimizer.loss_scale == (2.0**15 if dynamic else 2.0**16)
        optimizer.zero_grad()
        optimizer.backward(net(torch.ones(1, 2).half()).float().sum() / 8)
        assert not optimizer.overflow
        assert optimizer.param_groups[0]["params"][1].grad == 0.125
        optimizer.step()
        assert not torch.equal(net.weight, before)


def test_float32_parameters_accumulate_true_gradients_over_a_change_of_scale() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = FP16_Optimizer(_sgd([weight]), static_loss_scale=8.0)
    optimizer.backward((3 * weight).sum())
    optimizer.loss_scale = 32.0
    optimizer.backward((2 * weight).sum())
    assert weight.grad is not None and weight.grad.tolist() == [5.0, 5.0]
    assert optimizer.inspect_master_grad_data()[0][0] is weight.grad  # type: ignore[index]


def test_closure_is_evaluated_at_lower_scales_until_its_gradients_are_finite() -> None:
    net = nn.Linear(2, 1).half()
    optimizer = FP16_Optimizer(_sgd(net.parameters()), dynamic_loss_scale=True)
    scales = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(1, 2).half()).float().sum() * 4
        optimizer.backward(loss)
        scales.append(optimizer.loss_scale)
        return loss

    optimizer.step(closure)
    assert scales == [2.0**15, 2.0**14, 2.0**13]  # 4 * 2**14 is more than float16's 65504
    assert torch.isfinite(net.weight).all()


def test_resumed_run_is_the_run_that_went_on() -> None:
    def start() -> tuple[nn.Module, FP16_Optimizer]:
        net = fp16_utils.network_to_half(_net())
        return net, FP16_Optimizer(_sgd(net.parameters()), dynamic_loss_scale=True, verbose=False)

    def train(net: nn.Module, optimizer: FP16_Optimizer) -> list[float]:
        curve, (x, y) = [], _data()
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            optimizer.backward(loss)
            optimizer.step()
            curve.append(loss.item())
        return curve

    net, optimizer = start()
    train(net, optimizer)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    want = train(net, optimizer)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net, optimizer = start()
    net.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(net, optimizer) == want


def test_state_that_apex_wrote_loads_its_scaler_being_an_object() -> None:
    net = nn.Linear(2, 1).half()
    optimizer = FP16_Optimizer(_sgd(net.parameters()), dynamic_loss_scale=True)

    class Scaler:  # as it is after unpickling
        def __init__(self) -> None:
            self.cur_scale, self.cur_iter, self.last_overflow_iter = 512.0, 40, 30
            self.scale_factor, self.scale_window = 2.0, 1000

    state = {
        "loss_scaler": Scaler(),
        "dynamic_loss_scale": True,
        "overflow": False,
        "first_closure_call_this_step": True,
        "optimizer_state_dict": copy.deepcopy(optimizer.optimizer.state_dict()),
        "fp32_from_fp16": [[torch.full((1, 2), 0.1), torch.zeros(1)]],
    }
    optimizer.load_state_dict(state)
    assert optimizer.loss_scale == 512.0 and optimizer.param_groups[0]["params"][0].tolist() == [
        [pytest.approx(0.1)] * 2
    ]
    assert torch.equal(net.weight, torch.full((1, 2), 0.1).half()), "the model gets the copies' values"


def test_model_of_half_precision_casts_its_inputs_and_keeps_normalisation() -> None:
    model = fp16_utils.FP16Model(_net())
    assert model(_data()[0]).dtype is torch.float16
    norm = model.network.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.weight.dtype is norm.running_mean.dtype is torch.float32  # type: ignore[union-attr]
    assert fp16_utils.BN_convert_float(nn.Sequential(nn.BatchNorm1d(2)).half())[0].weight.dtype is torch.float32  # type: ignore[index]
