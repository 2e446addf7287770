"""Apex's `amp` over wrapprec: loops in Apex's words train like float32 loops written out by hand."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sidebyside import TOLERANCE, Results, assert_same, grads, weights
from torch import Tensor, nn
from torch.nn import functional as F

import wrapprec
from wrapprec.migrate.apex import amp
from wrapprec.migrate.apex.options import build_policy, build_scale, read_options
from wrapprec.migrate.apex.session import session


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    session.calls, session.enabled = [], None
    yield
    session.calls, session.enabled = [], None


each_level = pytest.mark.parametrize("level", ["O1", "O2"])


def _data(seed: int = 1, batches: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(torch.randn(8, 3, 6, 6), torch.randint(0, 4, (8,))) for _ in range(batches)]


def _classifier() -> nn.Module:
    torch.manual_seed(0)
    # No bias before a normalisation: its gradient is zero, so that nothing but rounding could be compared. Smooth: a
    # rounded activation crosses the corner of a ReLU, and a whole gradient comes or goes.
    body = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32, 4))


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


# imagenet-style


def _by_hand(model: nn.Module) -> Results:
    optimizer, losses = _sgd(model), []
    for x, y in _data():
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses += [loss.detach(), norm]
    return {"losses": torch.stack(losses), **grads(model), **weights(model)}


def _with_apex(model: nn.Module, **options: Any) -> Results:
    model, optimizer = amp.initialize(model, _sgd(model), **options)
    losses = []
    for x, y in _data():
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        with amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        norm = nn.utils.clip_grad_norm_(amp.master_params(optimizer), 0.5)
        optimizer.step()
        losses += [loss.detach(), norm]
    return {"losses": torch.stack(losses), **grads(model), **weights(model)}


@pytest.mark.parametrize("scale", [None, "dynamic", 128.0, "1024.0"])
@each_level
def test_imagenet_script_trains_as_in_float32(level: str, scale: Any) -> None:
    got = _with_apex(_classifier(), opt_level=level, loss_scale=scale, verbosity=0)
    # Four steps of momentum add up the roundings of each; a wrong scale is off by 128 at least.
    assert_same(got, _by_hand(_classifier()), "16-mixed", slack=8)


@pytest.mark.parametrize("keep", [None, True, "False"])
def test_o2_trains_whatever_is_said_of_batch_normalisation(keep: Any) -> None:
    got = _with_apex(_classifier(), opt_level="O2", keep_batchnorm_fp32=keep, verbosity=0)
    assert_same(got, _by_hand(_classifier()), "16-mixed", slack=8)


def _applies_true_half() -> bool:
    try:
        wrapprec.wrap(nn.Linear(2, 2), policy="16-true").unwrap()
    except wrapprec.PolicyError:
        return False
    return True


@pytest.mark.skipif(not _applies_true_half(), reason="16-true is not applied yet")
@pytest.mark.parametrize(
    "options",
    [
        {"opt_level": "O3"},
        {"opt_level": "O3", "keep_batchnorm_fp32": True},
        {"opt_level": "O3", "loss_scale": 128.0},
        {"opt_level": "O3", "loss_scale": "dynamic"},
        {"opt_level": "O2", "master_weights": False},
    ],
)
def test_o3_trains_in_float16_weights(options: dict[str, Any]) -> None:
    model = _classifier()
    got = _with_apex(model, verbosity=0, **options)
    keeps = options["opt_level"] == "O2" or options.get("keep_batchnorm_fp32") is True
    dtypes = [param.dtype for param in model.parameters()]
    assert dtypes == [torch.float16, *[torch.float32 if keeps else torch.float16] * 2, *[torch.float16] * 2]
    want = _by_hand(_classifier())
    assert got["losses"] is not None and want["losses"] is not None
    # Weights of order one, rounded to 11 bits at each of four steps.
    torch.testing.assert_close(got["losses"], want["losses"], rtol=8 * 2**-11, atol=8 * 2**-11)


@pytest.mark.parametrize("options", [{"opt_level": "O0"}, {"opt_level": "O0", "loss_scale": "dynamic"}])
def test_o0_is_bit_identical_to_float32(options: dict[str, Any]) -> None:
    got, want = _with_apex(_classifier(), verbosity=0, **options), _by_hand(_classifier())
    assert all(torch.equal(got[name], want[name]) for name in want)  # type: ignore[arg-type]  # no grad is None


@pytest.mark.parametrize("options", [{"enabled": False}, {"enabled": False, "opt_level": "O2", "loss_scale": 128}])
def test_disabled_amp_is_the_plain_loop(options: dict[str, Any]) -> None:
    got, want = _with_apex(_classifier(), **options), _by_hand(_classifier())
    assert all(torch.equal(got[name], want[name]) for name in want)  # type: ignore[arg-type]  # no grad is None
    assert amp.state_dict() == {} and amp.load_state_dict({}) is None


@each_level
def test_levels_are_the_policies_that_wrap_knows_by_their_names(level: str) -> None:
    mine, other = _classifier(), _classifier()
    got = _with_apex(mine, opt_level=level, verbosity=0)
    optimizer, losses = _sgd(other), []
    wrapprec.wrap(other, optimizer, level)
    for x, y in _data():
        optimizer.zero_grad()
        loss = F.cross_entropy(other(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        losses += [loss.detach(), norm]
    want = {"losses": torch.stack(losses), **grads(other), **weights(other)}
    assert all(torch.equal(got[name], want[name]) for name in want)  # type: ignore[arg-type]  # no grad is None


@each_level
def test_gradients_are_true_inside_the_context_already(level: str) -> None:
    plain, model = _classifier(), _classifier()
    (x, y), *_ = _data()
    F.cross_entropy(plain(x), y).backward()
    model, optimizer = amp.initialize(model, _sgd(model), opt_level=level, verbosity=0)
    with amp.scale_loss(F.cross_entropy(model(x), y), optimizer, delay_overflow_check=True, model=model) as scaled:
        scaled.backward()
        assert_same(grads(model), grads(plain), "16-mixed")


# DCGAN-style


class _Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        up = nn.Linear(4, 16, bias=False)
        self.G = nn.Sequential(up, nn.BatchNorm1d(16), nn.Softplus(), nn.Linear(16, 6), nn.Tanh())
        self.D = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 1))


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    # A large eps: with the usual one, Adam's first steps make the sign of tiny gradients count.
    return torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-2)


Backward = Callable[[Tensor, torch.optim.Optimizer, int], None]


def _train_gan(gan: _Gan, optimizer_d: Any, optimizer_g: Any, backward: Backward) -> Results:
    torch.manual_seed(2)
    found: Results = {}
    for step in range(3):
        real, noise = torch.randn(8, 6), torch.randn(8, 4)
        optimizer_d.zero_grad()
        error_real = F.binary_cross_entropy_with_logits(gan.D(real), torch.ones(8, 1))
        backward(error_real, optimizer_d, 0)
        fake = gan.G(noise)
        error_fake = F.binary_cross_entropy_with_logits(gan.D(fake.detach()), torch.zeros(8, 1))
        backward(error_fake, optimizer_d, 1)
        found |= {f"{step}.{name}": grad for name, grad in grads(gan.D).items()}
        optimizer_d.step()
        optimizer_g.zero_grad()
        error_g = F.binary_cross_entropy_with_logits(gan.D(fake), torch.ones(8, 1))
        backward(error_g, optimizer_g, 2)
        found |= {f"{step}.{name}": grad for name, grad in grads(gan.G).items()}
        optimizer_g.step()
        found[f"{step}.errors"] = torch.stack([error_real, error_fake, error_g]).detach()
    return found


def _scaled_backward(loss: Tensor, optimizer: torch.optim.Optimizer, loss_id: int) -> None:
    with amp.scale_loss(loss, optimizer, loss_id=loss_id) as scaled:
        scaled.backward()


def _plain_gan() -> Results:
    gan = _Gan()
    return _train_gan(gan, _adam(gan.D), _adam(gan.G), lambda loss, *_: loss.backward())


@each_level
def test_dcgan_script_with_three_losses_trains_as_in_float32(level: str) -> None:
    gan = _Gan()
    optimizers = [_adam(gan.D), _adam(gan.G)]
    [gan.D, gan.G], [d, g] = amp.initialize([gan.D, gan.G], optimizers, opt_level=level, num_losses=3, verbosity=0)
    # Gradients of later steps carry the roundings of the steps before.
    assert_same(_train_gan(gan, d, g, _scaled_backward), _plain_gan(), "16-mixed", slack=4)
    assert [*amp.state_dict()][:3] == ["loss_scaler0", "loss_scaler1", "loss_scaler2"]


def test_initialize_for_each_model_of_a_gan_apart_trains_as_in_float32() -> None:
    gan = _Gan()
    gan.D, d = amp.initialize(gan.D, _adam(gan.D), verbosity=0)
    gan.G, g = amp.initialize(gan.G, _adam(gan.G), num_losses=3, verbosity=0)
    assert_same(_train_gan(gan, d, g, _scaled_backward), _plain_gan(), "16-mixed", slack=4)
    assert len(amp.state_dict()["wrapprec"]) == 2


# Accumulation


@each_level
def test_accumulation_with_delayed_unscaling_adds_up_true_gradients(level: str) -> None:
    plain, model = _classifier(), _classifier()
    for x, y in _data():
        (F.cross_entropy(plain(x), y) / 4).backward()
    model, optimizer = amp.initialize(model, _sgd(model), opt_level=level, verbosity=0)
    for number, (x, y) in enumerate(_data()):
        loss = F.cross_entropy(model(x), y) / 4
        with amp.scale_loss(loss, optimizer, delay_unscale=number < 3) as scaled:
            scaled.backward()
    assert_same(grads(model), grads(plain), "16-mixed")


@each_level
def test_overflow_skips_the_step_and_halves_the_scale(level: str) -> None:
    model, optimizer = amp.initialize(_classifier(), None, opt_level=level, verbosity=0), None
    optimizer = _sgd(model)
    before = weights(model)
    (x, y), *_ = _data()
    # 1e4 times the largest float16 that a scale of 2**16 leaves room for.
    with amp.scale_loss(F.cross_entropy(model(x), y) * 1e4, optimizer) as scaled:
        scaled.backward()
    optimizer.step()
    after = weights(model)
    assert all(torch.equal(after[k], v) for k, v in before.items() if "running" not in k)  # type: ignore[arg-type]
    assert amp.state_dict()["loss_scaler0"] == {"loss_scale": 2.0**15, "unskipped": 0}


# What comes back


def test_initialize_gives_back_what_it_was_given() -> None:
    one, two = _classifier(), _classifier()
    first, second = _sgd(one), _sgd(two)
    models, optimizers = [one, two], [first, second]
    got = amp.initialize(models, optimizers, verbosity=0)
    assert got[0] is models and got[1] is optimizers and models == [one, two] and optimizers == [first, second]
    assert amp.initialize(alone := _classifier(), verbosity=0) is alone
    model, [optimizer] = amp.initialize(third := _classifier(), [_sgd(third)], verbosity=0)
    assert model is third and isinstance(optimizer, torch.optim.SGD)
    models, optimizer = amp.initialize([fourth := _classifier()], _sgd(fourth), verbosity=0)
    assert models == [fourth] and isinstance(optimizer, torch.optim.SGD)


def test_unwrap_leaves_nothing_of_initialize() -> None:
    model = _classifier()
    optimizer = _sgd(model)
    before = [dict(module.__dict__) for module in model.modules()], dict(optimizer.__dict__)
    amp.initialize(model, optimizer, opt_level="O2", verbosity=0)
    assert wrapprec.handle_of(model) is not None
    wrapprec.unwrap(model)
    after = [dict(module.__dict__) for module in model.modules()], dict(optimizer.__dict__)
    assert [set(d) for d in before[0]] == [set(d) for d in after[0]] and before[1].keys() == after[1].keys()
    with pytest.raises(wrapprec.NotWrappedError, match=r"amp\.initialize before amp\.scale_loss"):
        _scaled_backward(torch.ones(1), optimizer, 0)


def test_optimizer_made_after_initialize_is_guarded() -> None:
    model = amp.initialize(_classifier(), opt_level="O1", verbosity=0)
    optimizer = _sgd(model)
    (x, y), *_ = _data()
    _scaled_backward(F.cross_entropy(model(x), y), optimizer, 0)
    next(model.parameters()).grad[0] = torch.inf
    before = weights(model)
    optimizer.step()
    after = weights(model)
    assert all(torch.equal(after[k], v) for k, v in before.items())  # type: ignore[arg-type]


def test_initialize_again_guards_another_optimizer_of_the_same_model() -> None:
    model, _head = amp.initialize(model := _classifier(), _sgd(model[-1]), verbosity=0)
    handle = wrapprec.handle_of(model)
    model, whole = amp.initialize(model, _sgd(model), verbosity=0)
    assert wrapprec.handle_of(model) is handle and len(amp.state_dict()["wrapprec"]) == 1
    with pytest.raises(wrapprec.AlreadyWrappedError, match=r"call wrapprec\.unwrap\(model\) before"):
        amp.initialize(model, whole, opt_level="O2", verbosity=0)
    with pytest.raises(wrapprec.AlreadyWrappedError, match="with other models or options"):
        amp.initialize([model, _classifier()], whole, verbosity=0)


def test_initialize_that_fails_changes_nothing() -> None:
    model = _classifier().half()
    with pytest.raises(wrapprec.PolicyError, match="float"):
        amp.initialize(model, _sgd(model), verbosity=0)
    assert wrapprec.handle_of(model) is None and session.enabled is None and not session.calls


# Saving and resuming


def _one_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    _scaled_backward(F.cross_entropy(model(batch[0]), batch[1]), optimizer, 0)
    optimizer.step()


def test_resumed_run_is_bit_identical() -> None:
    model, optimizer = amp.initialize(model := _classifier(), _sgd(model), max_loss_scale=2.0**10, verbosity=0)
    batches = _data()
    for batch in batches[:2]:
        _one_step(model, optimizer, batch)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), amp.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved[2]["loss_scaler0"] == {"loss_scale": 1024.0, "unskipped": 2}
    fresh, other = amp.initialize(fresh := _classifier(), _sgd(fresh), max_loss_scale=2.0**10, verbosity=0)
    for part, state in zip([fresh, other, amp], saved, strict=True):
        part.load_state_dict(state)
    assert amp.state_dict()["loss_scaler0"] == saved[2]["loss_scaler0"]
    for batch in batches[2:]:
        _one_step(model, optimizer, batch)
        _one_step(fresh, other, batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_checkpoint_of_apex_loads() -> None:
    amp.initialize(model := _classifier(), _sgd(model), num_losses=2, verbosity=0)
    old = {
        "loss_scaler0": {"loss_scale": 4096.0, "unskipped": 17},
        "loss_scaler1": {"loss_scale": 32.0, "unskipped": 5},
    }
    amp.load_state_dict(copy.deepcopy(old))
    # The smallest: a scale that never overflowed in Apex overflows in no model.
    want = {"loss_scale": 32.0, "unskipped": 5}
    assert amp.state_dict()["loss_scaler0"] == amp.state_dict()["loss_scaler1"] == want
    scaler = amp._amp_state.loss_scalers[1]
    assert (scaler.loss_scale(), scaler._loss_scale, scaler._unskipped, scaler.dynamic) == (32.0, 32.0, 5, True)
    assert amp._amp_state.opt_properties.opt_level == "O1"


def test_state_of_a_loss_is_that_of_the_models_it_trains() -> None:
    gan = _Gan()
    amp.initialize([gan.D, gan.G], [d := _adam(gan.D), g := _adam(gan.G)], num_losses=2, verbosity=0)
    d_handle = session.calls[0].handle
    scale = d_handle.state_dict()["scales"]
    scale[0]["scale"], scale[1]["scale"] = 256.0, 8.0
    d_handle.load_state_dict({"scales": scale})
    state = amp.state_dict()
    assert state["loss_scaler0"]["loss_scale"] == state["loss_scaler1"]["loss_scale"] == 8.0  # none was seen yet
    _scaled_backward(gan.D(torch.ones(1, 6)).sum(), d, 0)
    _scaled_backward(gan.D(gan.G(torch.ones(2, 4))).sum(), g, 1)
    state = amp.state_dict()
    assert (state["loss_scaler0"]["loss_scale"], state["loss_scaler1"]["loss_scale"]) == (256.0, 8.0)


@pytest.mark.parametrize(
    "state", [{"scale": 2.0}, {"loss_scaler0": 3.0}, {"loss_scaler0": {"loss_scale": 2.0}}, {"model": {}}]
)
def test_state_of_something_else_is_refused(state: Any) -> None:
    amp.initialize(_classifier(), verbosity=0)
    before = amp.state_dict()
    with pytest.raises(wrapprec.PolicyError, match=r"the state of amp\.state_dict\(\)"):
        amp.load_state_dict(state)
    assert amp.state_dict() == before


# Options


@pytest.mark.parametrize(
    ("options", "policy", "scale"),
    [
        ({"opt_level": "O0"}, "32-true", None),
        ({"opt_level": "O0", "loss_scale": 128}, "32-true", 128.0),
        ({"opt_level": "O1"}, "16-mixed", "dynamic"),
        ({"opt_level": "O1", "loss_scale": 1.0}, "16-mixed", 1.0),
        ({"opt_level": "O1", "patch_torch_functions": False}, "32-true", "dynamic"),
        ({"opt_level": "O1", "keep_batchnorm_fp32": "True"}, "16-mixed", "dynamic"),
        ({"opt_level": "O1", "cast_model_type": torch.float32}, "16-mixed", "dynamic"),
        ({"opt_level": "O2"}, "16-module", "dynamic"),
        ({"opt_level": "O2", "loss_scale": "128.0"}, "16-module", 128.0),
        ({"opt_level": "O2", "cast_model_type": torch.bfloat16}, "bf16-module", "dynamic"),
        ({"opt_level": "O2", "cast_model_type": torch.float32}, "32-true", "dynamic"),
        ({"opt_level": "O2", "cast_model_type": False}, "32-true", "dynamic"),
        ({"opt_level": "O2", "master_weights": False}, "16-true", "dynamic"),
        ({"opt_level": "O3"}, "16-true", None),
        ({"opt_level": "O3", "loss_scale": "dynamic"}, "16-true", "dynamic"),
        ({"opt_level": "O3", "master_weights": "True"}, "16-module", 1.0),
    ],
)
def test_options_mean_a_policy_and_a_scale(options: dict[str, Any], policy: str, scale: Any) -> None:
    level = options.pop("opt_level")
    read = read_options(level, options)
    assert read.policy() == policy
    found = build_scale(read, None, 2.0**24)
    if scale == "dynamic":
        assert found == wrapprec.LossScale(max_scale=2.0**24)
    else:
        assert found == (None if scale is None else wrapprec.LossScale.static(scale))


@pytest.mark.parametrize(
    ("least", "most", "first"), [(None, None, 2.0**16), (None, 4.0, 4.0), (2.0**20, 2.0**24, 2.0**20), (8, 64, 64.0)]
)
def test_bounds_of_the_scale_hold_from_the_start(least: Any, most: Any, first: float) -> None:
    scale = build_scale(read_options("O1", {}), least, most)
    assert scale is not None and scale.init_scale == first
    assert (scale.min_scale, scale.max_scale) == (least or 1.0, most or wrapprec.LossScale.max_scale)


@pytest.mark.parametrize(
    ("level", "keep", "low", "computes"),
    [
        ("O2", None, "16-module", torch.float32),
        ("O2", "False", "16-module", torch.float32),
        ("O3", True, "16-true", torch.float32),
        ("O3", None, "16-true", torch.float16),
    ],
)
def test_batch_normalisation_computes_in_what_was_asked_for(level: str, keep: Any, low: str, computes: Any) -> None:
    model = _classifier()
    options = read_options(level, {"keep_batchnorm_fp32": keep})
    assert options.policy() == low
    plan = wrapprec.resolve(model, build_policy(options, [model], None))
    placed = {placement.name: placement.precision for placement in plan.placements}
    assert placed["1"].compute_dtype is computes
    assert placed["0"].compute_dtype is torch.float16 and plan.policy.output_dtype is torch.float32


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_outputs_are_cast_to_what_was_asked_for(level: str) -> None:
    model = amp.initialize(_classifier(), opt_level=level, cast_model_outputs=torch.bfloat16, verbosity=0)
    assert model(_data()[0][0]).dtype is torch.bfloat16
    with pytest.raises(wrapprec.PolicyError, match="output=float16"):
        amp.initialize(_classifier(), opt_level=level, cast_model_outputs=torch.float16, verbosity=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"opt_level": "02"}, "write the letter O, not a zero"),
        ({"opt_level": "O4"}, "an opt_level: O0, O1, O2 or O3"),
        ({"opt_level": "O2", "patch_torch_functions": True}, "use opt_level='O1'"),
        ({"opt_level": "O1", "keep_batchnorm_fp32": False}, "leave keep_batchnorm_fp32 out"),
        ({"opt_level": "O1", "cast_model_type": torch.float16}, "use opt_level='O2'"),
        ({"opt_level": "O2", "cast_model_type": torch.int8}, "a floating dtype as cast_model_type"),
        ({"opt_level": "O2", "keep_batchnorm_fp32": "yes"}, "True or False for keep_batchnorm_fp32"),
        ({"opt_level": "O2", "loss_scale": "much"}, "a loss_scale: 'dynamic' or a number"),
        ({"loss_scale": -1.0}, "min_scale"),
    ],
)
def test_wrong_options_are_refused_with_a_remedy(options: dict[str, Any], text: str) -> None:
    model = _classifier()
    with pytest.raises(wrapprec.PolicyError) as raised:
        amp.initialize(model, _sgd(model), verbosity=0, **options)
    assert text in str(raised.value) and "Received: " in str(raised.value) and "Remedy: " in str(raised.value)
    assert wrapprec.handle_of(model) is None


@given(
    level=st.sampled_from(["O0", "O1", "O2", "O3"]),
    cast_model_type=st.sampled_from([None, False, torch.float32, torch.float16, torch.bfloat16]),
    patch_torch_functions=st.sampled_from([None, True, False]),
    keep_batchnorm_fp32=st.sampled_from([None, True, False, "True", "False"]),
    master_weights=st.sampled_from([None, True, False]),
    loss_scale=st.sampled_from([None, "dynamic", 1.0, 128, "4096"]),
)
def test_any_combination_of_options_is_planned_or_refused(level: str, **options: Any) -> None:
    model = _classifier()
    try:
        read = read_options(level, options)
    except wrapprec.PolicyError as error:
        assert "Remedy: " in str(error)
        return
    plan = wrapprec.resolve(model, build_policy(read, [model], None), loss_scale=build_scale(read, None, 2.0**24))
    low = {"16": torch.float16, "bf": torch.bfloat16}.get(read.policy()[:2], torch.float32)
    placed = {placement.name: placement.precision for placement in plan.placements}
    assert placed["0"].compute_dtype is low and plan.policy.output_dtype is torch.float32
    keep = {"True": True, "False": False}.get(str(options["keep_batchnorm_fp32"]), read.keep_batchnorm_fp32)
    if keep is not None and read.policy() in ("16-true", "bf16-true"):
        assert placed["1"].compute_dtype is (torch.float32 if keep else low)
    wanted = options["loss_scale"]
    if wanted not in (None, "dynamic", 1.0):
        assert plan.loss_scale == wrapprec.LossScale.static(float(wanted))


def test_unannounced_loss_is_refused() -> None:
    amp.initialize(model := _classifier(), optimizer := _sgd(model), num_losses=2, verbosity=0)
    with pytest.raises(wrapprec.PolicyError, match=r"loss_id=2 with num_losses=2"):
        _scaled_backward(torch.ones(1), optimizer, 2)


@pytest.mark.parametrize("use", [amp.state_dict, lambda: amp.load_state_dict({}), lambda: amp._amp_state.loss_scalers])
def test_use_before_initialize_is_refused(use: Callable[[], Any]) -> None:
    with pytest.raises(wrapprec.NotWrappedError, match=r"amp\.initialize\(model, optimizer, opt_level="):
        use()


def test_options_that_a_command_line_gives_as_the_text_none_are_left_to_the_level() -> None:
    given: dict[str, object] = {"keep_batchnorm_fp32": "None", "loss_scale": "None", "master_weights": "None"}
    assert read_options("O2", given) == read_options("O2", {})


def test_verbosity_says_what_an_opt_level_is(capsys: pytest.CaptureFixture[str]) -> None:
    amp.initialize(_classifier(), verbosity=2, max_loss_scale=2.0**18)
    err = capsys.readouterr().err
    assert "opt_level O1 of apex.amp is the policy 16-mixed" in err and "BatchNorm2d" in err
    amp.initialize(_classifier(), verbosity=0, max_loss_scale=2.0**19)
    assert capsys.readouterr() == ("", "")


# Functions


class _Calls(nn.Module):
    """Hands its activations to a function, which notes what it got."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.low(x), x)


def _product(seen: list[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        out = a @ b.mT
        seen.append((a.dtype, b.dtype, out.dtype))
        return out

    return product


HALF, SINGLE = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("decorator", "inside"),
    [
        (amp.half_function, (HALF, HALF, HALF)),
        (amp.float_function, (SINGLE, SINGLE, SINGLE)),
        (amp.promote_function, (SINGLE, SINGLE, HALF)),
        (lambda function: function, (HALF, SINGLE, HALF)),
    ],
)
def test_functions_get_the_dtype_they_ask_for_inside_an_o1_forward(decorator: Any, inside: Any) -> None:
    seen: list[Any] = []
    function, x = decorator(_product(seen)), torch.randn(3, 4)
    plain = _Calls(function)
    want = plain(x)
    model = amp.initialize(copy.deepcopy(plain), opt_level="O1", verbosity=0)
    got = model(x)
    assert seen == [(SINGLE, SINGLE, SINGLE), inside]
    assert (got - want).norm() <= TOLERANCE["16"] * want.norm()
    got.mean().backward()
    want.mean().backward()
    assert_same(grads(model), grads(plain), "16-mixed")
    function(x, x)
    assert seen[-1] == (SINGLE, SINGLE, SINGLE)  # outside of any forward


@pytest.mark.parametrize("kind", ["half", "float", "promote"])
def test_registered_functions_are_found_where_their_module_is_asked(kind: str) -> None:
    class Library:
        pass

    seen: list[Any] = []
    register = getattr(amp, f"register_{kind}_function")
    original = Library.product = staticmethod(_product(seen))  # type: ignore[attr-defined]
    register(Library, "product")
    first = Library.product  # type: ignore[attr-defined]
    register(Library, "product")
    assert Library.product is first is not original  # type: ignore[attr-defined]
    model = amp.initialize(_Calls(lambda a, b: Library.product(a, b)), verbosity=0)  # type: ignore[attr-defined]
    model(torch.randn(3, 4))
    assert seen[0][:2] == {"half": (HALF, HALF), "float": (SINGLE, SINGLE), "promote": (SINGLE, SINGLE)}[kind]
    with pytest.raises(ValueError, match="'nothing'"):
        register(Library, "nothing")


def test_disable_casts_computes_in_float32_around_a_call_and_inside() -> None:
    plain, (x, _) = _classifier(), _data()[0]
    want = plain(x)
    model = amp.initialize(_classifier(), verbosity=0)
    with amp.disable_casts(), amp.disable_casts():
        inside = model(x)
    model.load_state_dict(_classifier().state_dict())
    assert torch.equal(inside, want) and not torch.equal(model(x), want)

    seen: list[Any] = []

    def function(a: Tensor, b: Tensor) -> Tensor:
        with amp.disable_casts():
            return _product(seen)(a, b)

    model = amp.initialize(_Calls(function), verbosity=0)
    model(torch.randn(3, 4))
    assert seen[0][2] is SINGLE
    with pytest.raises(ZeroDivisionError), amp.disable_casts():
        raise ZeroDivisionError
    model(torch.randn(3, 4))
    assert all(region.autocasts for region in {m.forward.region for m in model.modules()})  # type: ignore[union-attr]


def test_disable_casts_leaves_o2_as_it_is() -> None:
    model = amp.initialize(_classifier().eval(), opt_level="O2", verbosity=0)
    want = model(_data()[0][0])
    with amp.disable_casts():
        assert torch.equal(model(_data()[0][0]), want)
