"""The Functions at the border: what they multiply by, and what they record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wrapprec import LossScale, ScaleLeakError
from wrapprec.border import Border
from wrapprec.boundary import Enter, Leave, Lend
from wrapprec.bucket import Bucket
from wrapprec.flags import check_and_scale_, scalar
from wrapprec.scale import Scaler

S = 8.0


@pytest.fixture
def border() -> Border:
    return Border(Scaler(LossScale(init_scale=S), torch.device("cpu")))


@pytest.fixture
def bucket() -> Bucket:
    return Bucket((), False, torch.device("cpu"))


def inside(border: Border, bucket: Bucket, x: Tensor, w: Tensor, multi: bool = False) -> Tensor:
    bucket.multi_tensor = multi
    (lent,) = Lend.apply(border, bucket, (None,), w)
    out: Tensor = Leave.apply(Enter.apply(x, border).square() * lent.square(), border)
    return out


@pytest.mark.parametrize("multi", [False, True])
def test_all_orders_of_derivatives_are_those_without_a_border(border: Border, bucket: Bucket, multi: bool) -> None:
    """Checked by finite differences in float64, up to second derivatives of the gradient function."""
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    # 1/S goes through float32: exact for a power of two.
    assert torch.autograd.gradcheck(lambda x, w: inside(border, bucket, x, w, multi), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: inside(border, bucket, x, w, multi), (x, w))

    def slope(x: Tensor, w: Tensor) -> Any:
        return torch.autograd.grad(inside(border, bucket, x, w, multi).sum(), (x, w), create_graph=True)

    assert torch.autograd.gradgradcheck(slope, (x, w))


def test_gradients_inside_are_scaled(border: Border, bucket: Bucket) -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    hidden = Enter.apply(x, border) * 3
    hidden.register_hook(lambda grad: seen.append(grad.clone()))
    Leave.apply(hidden, border).sum().backward()
    assert seen[0].tolist() == [S, S] and x.grad is not None and x.grad.tolist() == [3, 3]


def test_nested_borders_multiply_inside_and_divide_on_the_way_out(border: Border, bucket: Bucket) -> None:
    inner = Border(Scaler(LossScale(init_scale=4.0), torch.device("cpu")), outer=border)
    x, w, seen = torch.ones(2, requires_grad=True), torch.full((2,), 5.0, requires_grad=True), []
    (lent,) = Lend.apply(inner, bucket, (None,), w)
    hidden = Enter.apply(Enter.apply(x, border) * 2, inner) * lent
    hidden.register_hook(lambda grad: seen.append(grad.clone()))
    Leave.apply(Leave.apply(hidden, inner), border).sum().backward()
    assert seen[0].tolist() == [4 * S] * 2 and x.grad is not None and w.grad is not None
    assert x.grad.tolist() == [10, 10] and w.grad.tolist() == [2, 2]


def test_two_borders_have_the_same_factor_only_with_the_same_scales_all_the_way_out(border: Border) -> None:
    scaler = Scaler(LossScale(init_scale=4.0), torch.device("cpu"))
    alone, nested, again = Border(scaler), Border(scaler, outer=border), Border(scaler, outer=border)
    assert nested.same_factor(again) and not alone.same_factor(nested) and not nested.same_factor(alone)
    assert not alone.same_factor(None) and not alone.same_factor(border) and alone.same_factor(alone)


def test_gradient_that_got_in_past_the_border_is_refused(border: Border, bucket: Bucket) -> None:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(ScaleLeakError, match="an input"):
        Enter.apply(x, border).sum().backward()
    (lent,) = Lend.apply(border, bucket, (None,), w)
    with pytest.raises(ScaleLeakError, match="a weight"):
        lent.sum().backward()
    assert x.grad is None and w.grad is None


def test_outputs_are_no_views_and_share_the_version_counter(border: Border) -> None:
    base = torch.ones(4, requires_grad=True) * 2
    out = Leave.apply(base, border)
    assert not out._is_view() and out.data_ptr() == base.data_ptr()
    version = base._version
    out.add_(1)
    assert base._version == version + 1


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_overflow_is_recorded_for_inputs_and_weights(border: Border, bucket: Bucket, value: float) -> None:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    (lent,) = Lend.apply(border, bucket, (None,), w)
    Leave.apply(Enter.apply(x, border) * 1e3 + lent * 1e3, border).backward(torch.tensor([value, 1.0]))
    assert border.scaler.seen.item() == 1 and bucket.found is not None and bucket.found.item() == 1


def test_weights_nobody_used_get_none(border: Border, bucket: Bucket) -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    one, _ = Lend.apply(border, bucket, (torch.float16, torch.float16), used, unused)
    Leave.apply(one.float(), border).sum().backward()
    assert unused.grad is None and used.grad is not None and used.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_check_multiplies_in_place_and_finds_inf_and_nan(dtype: torch.dtype) -> None:
    good, bad = torch.ones(3, dtype=dtype), torch.tensor([1.0, float("nan")], dtype=dtype)
    flags = check_and_scale_([good], torch.tensor(0.5))
    assert [f.item() for f in flags] == [0] and good.tolist() == [0.5] * 3 and flags[0].dtype == torch.float32
    assert max(f.item() for f in check_and_scale_([good, bad], torch.tensor(1.0))) == 1


def test_bfloat16_is_multiplied_in_float32_without_the_kernel_that_cuda_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch._amp_foreach_non_finite_check_and_unscale_

    def on_cuda(grads: list[torch.Tensor], flag: torch.Tensor, factor: torch.Tensor) -> None:
        if any(grad.dtype is torch.bfloat16 for grad in grads):
            raise NotImplementedError('"_amp_foreach_non_finite_check_and_unscale_cuda" not implemented for BFloat16')
        kernel(grads, flag, factor)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", on_cuda)
    numbers = torch.linspace(1.0, 2.0, 100).to(torch.bfloat16)
    grads = [numbers.clone(), torch.tensor([1.0, float("inf")], dtype=torch.bfloat16)]
    # 1/1000 is no bfloat16 number: rounded before the product, some of the hundred would be off.
    assert [flag.item() for flag in check_and_scale_(grads, torch.tensor(1e-3))] == [1]
    assert torch.equal(grads[0], (numbers.float() * 1e-3).to(torch.bfloat16))
    assert not torch.equal(grads[0], numbers * torch.tensor(1e-3).to(torch.bfloat16))


@pytest.mark.parametrize(("to", "waits"), [("cpu", True), ("meta", False)])
def test_host_waits_for_numbers_that_it_gets_from_a_device_and_for_no_others(
    monkeypatch: pytest.MonkeyPatch, to: str, waits: bool
) -> None:
    # A copy to the host that nobody waits for goes to pinned memory, and is read before it is there.
    seen = []

    def spy(number: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        seen.append(non_blocking)
        return torch.zeros((), device=device)

    number = torch.ones((), device="meta" if to == "cpu" else "cpu")
    monkeypatch.setattr(torch.Tensor, "to", spy)
    assert scalar(number, torch.ones(2, device=to)).device.type == to
    assert seen == [not waits]


def test_memory_of_past_backwards_is_bounded(border: Border) -> None:
    for _ in range(200):
        x = torch.ones(1, requires_grad=True)
        Leave.apply(Enter.apply(x, border), border).backward()
    assert len(border.scaler.borders) <= 64
