"""The optimizers of bitsandbytes in a wrapped loop: their own steps, bit for bit, and no trace of a skipped one."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec
from wrapprec import PolicyError

NAMES = ["Adam", "AdamW", "SGD", "Lion", "RMSprop", "Adagrad", "AdEMAMix", "LAMB", "LARS"]
PAGED = ["PagedAdam", "PagedAdamW", "PagedLion", "PagedAdEMAMix"]
# Each in its three spellings: named after its bits, or given them.
FORMS = [f"{name}{bits}" for name in NAMES for bits in ("8bit", "32bit", "")]
FORMS += [f"{name}{bits}" for name in PAGED for bits in ("8bit", "32bit", "")]
WRONG = ["LAMB8bit", "LARS8bit"]
BROKEN = ["AdEMAMix32bit", "PagedAdEMAMix32bit"]

every = pytest.mark.parametrize("form", [form for form in FORMS if form not in WRONG + BROKEN])


@pytest.fixture(autouse=True)
def _paging_is_for_gpus() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def build(form: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    import bitsandbytes

    options = {"lr": 0.01, **({"momentum": 0.9} if form.startswith(("SGD", "LARS")) else {}), **options}
    return getattr(bitsandbytes.optim, form)(model.parameters(), **options)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64))


def gradients(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=draw) * 0.1


def state_of(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy({i: dict(s) for i, s in enumerate(optimizer.state.values())})


def assert_identical(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_identical(value, other[key])
        elif isinstance(value, Tensor):
            assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


@every
def test_steps_are_bitsandbytes_own_and_a_skipped_one_leaves_no_trace(form: str) -> None:
    model, plain = make(), make()
    optimizer, reference = build(form, model), build(form, plain)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=1024.0)
    for number in range(5):
        if number in (0, 3):
            # An overflow in backward, before there is any state and after; clipping hides it from the gradients.
            before = dict(model.state_dict()), state_of(optimizer)
            before = copy.deepcopy(before)
            (model(torch.ones(2, 64)).sum() * math.inf).backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
            optimizer.step()
            assert handle.step_was_skipped
            assert_identical(dict(model.state_dict()), before[0])
            assert_identical(state_of(optimizer), before[1])
            optimizer.zero_grad()
        for net, opt in ((model, optimizer), (plain, reference)):
            gradients(net, number)
            opt.step()
        assert not handle.step_was_skipped
    assert handle.skipped_steps == 2
    assert_identical(dict(model.state_dict()), dict(plain.state_dict()))
    assert_identical(state_of(optimizer), state_of(reference))
    assert not torch.equal(model[0].weight, make()[0].weight)


@every
def test_checkpoint_goes_on_to_the_bit(form: str) -> None:
    model, plain = make(), make()
    optimizer, reference = build(form, model), build(form, plain)
    handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=1024.0)
    for number in range(4):
        if number == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            handle.unwrap()
            optimizer = build(form, model)
            handle = wrapprec.wrap(model, optimizer, "16-mixed", loss_scale=1024.0)
            handle.load_state_dict(handle.state_dict())
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        for net, opt in ((model, optimizer), (plain, reference)):
            gradients(net, number)
            opt.step()
    assert_identical(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("form", ["AdamW8bit", "SGD32bit", "Lion8bit"])
def test_trains_under_16_mixed_as_in_float32(form: str) -> None:
    model, plain = make(), make()
    optimizer, reference = build(form, model), build(form, plain)
    handle = wrapprec.wrap(model, optimizer, "16-mixed")
    x = torch.randn(32, 64)
    losses = []
    for net, opt in ((model, optimizer), (plain, reference)):
        for _ in range(30):
            opt.zero_grad()
            loss = (net(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            opt.step()
        losses.append(float(loss.detach()))
    assert handle.skipped_steps == 0
    # float16 rounds activations to 2**-11. Lion steps by signs, which turn where a gradient is near zero; without
    # training the loss is 1.18.
    assert losses[0] == pytest.approx(losses[1], rel=0.15) and losses[1] < 1.1


@pytest.mark.parametrize("form", WRONG)
def test_kernels_that_ignore_the_trust_ratio_are_refused(form: str) -> None:
    model = make()
    before = dict(vars(model))
    with pytest.raises(PolicyError) as caught:
        wrapprec.wrap(model, build(form, model), "bf16-mixed")
    text = str(caught.value)
    assert f"Received: {form}, whose 8-bit kernel ignores the trust ratio on cpu" in text
    assert "Where: param_groups[0], of shape (80, 64)" in text
    assert f"Remedy: use bitsandbytes' {form[:4]} with optim_bits=32" in text
    assert vars(model) == before and wrapprec.handle_of(model) is None


@pytest.mark.parametrize("form", WRONG)
def test_the_trust_ratio_is_really_ignored(form: str) -> None:
    model = make()
    optimizer, wide = build(form, model, lr=1.0), build(f"{form[:4]}32bit", model, lr=1.0, max_unorm=1.0)
    lengths = {}
    for opt in (optimizer, wide):
        weight = model[0].weight
        before = weight.detach().clone()
        gradients(model, 0)
        weight.grad *= 1000
        opt.step()
        lengths[opt] = float((weight.detach() - before).norm() / before.norm())
        weight.data.copy_(before)
    # max_unorm is 1 by default, but for LARS, where it is 0.02. Adam's bias correction makes LAMB's first step shorter.
    assert lengths[wide] <= 1.001 and lengths[optimizer] > 5 * lengths[wide]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}8bit" not in WRONG])
def test_the_8_bit_kernels_that_are_taken_compute_as_those_of_32_bits(name: str, decay: float) -> None:
    narrow, wide = make(), make()
    forms = f"{name}8bit", name if name == "AdEMAMix" else f"{name}32bit"
    optimizers = [build(form, net, weight_decay=decay) for form, net in zip(forms, (narrow, wide), strict=True)]
    for number in range(6):
        for net, optimizer in zip((narrow, wide), optimizers, strict=True):
            gradients(net, number)
            optimizer.step()
    moved = (wide[0].weight - make()[0].weight).detach().norm()
    # Six roundings of the state, of which each is 1 % of a large value. Lion's step is the sign of a sum, which
    # rounding turns now and then.
    assert (narrow[0].weight - wide[0].weight).detach().norm() < (0.1 if name == "Lion" else 0.03) * moved


@pytest.mark.parametrize("form", BROKEN)
def test_an_optimizer_without_room_for_its_averages_is_refused(form: str) -> None:
    model = make()
    with pytest.raises(PolicyError) as caught:
        wrapprec.wrap(model, build(form, model), "bf16-mixed")
    assert f"Received: {form}, which makes room for one of its two averages" in str(caught.value)
    assert "Remedy: use bitsandbytes' AdEMAMix with optim_bits=32" in str(caught.value)


@pytest.mark.parametrize("form", WRONG)
def test_small_tensors_keep_32_bits_and_are_taken(form: str) -> None:
    model = nn.Linear(8, 8)
    optimizer = build(form, model)
    wrapprec.wrap(model, optimizer, "bf16-mixed")
    gradients(model, 0)
    optimizer.step()


def test_the_bits_count_and_not_the_name() -> None:
    model = make()
    with pytest.raises(PolicyError, match="Received: LARS, whose 8-bit kernel ignores the trust ratio"):
        wrapprec.wrap(model, build("LARS", model, optim_bits=8), "bf16-mixed")


@pytest.mark.parametrize("form", WRONG)
def test_attach_refuses_them_too(form: str) -> None:
    model = make()
    handle = wrapprec.wrap(model, policy="bf16-mixed")
    with pytest.raises(PolicyError, match="ignores the trust ratio"):
        handle.attach(build(form, model))


def test_optimizer_bits_says_that_they_have_few_bits_already() -> None:
    model = make()
    with pytest.raises(PolicyError, match="its state has few bits already: leave optimizer_bits out"):
        wrapprec.wrap(model, build("AdamW8bit", model), "bf16-mixed", optimizer_bits=8)
