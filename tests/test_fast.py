"""`32-fast`: float32 products by the device's faster road, for as long as a model is wrapped."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wrapprec import Plan, PolicyError, Rule, resolve, wrap
from wrapprec.backends import fast
from wrapprec.backends.fast import Switches
from wrapprec.backends.select import backend_for

SWITCHES = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn)


def settings() -> list[str]:
    return [switch.fp32_precision for switch in SWITCHES]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))


def test_switches_are_on_while_wrapped_and_as_they_were_afterwards() -> None:
    before = settings()
    with wrap(net(), None, "32-fast"):
        assert settings() == ["bf16"] * 3 != before
    assert settings() == before


def test_users_own_setting_comes_back() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        wrap(net(), None, "32-fast").unwrap()
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("first", [0, 1])
def test_last_of_two_models_puts_the_settings_back(first: int) -> None:
    before = settings()
    handles = [wrap(net(), None, "32-fast"), wrap(net(), None, "32-fast")]
    handles[first].unwrap()
    handles[first].unwrap()
    assert settings() == ["bf16"] * 3
    handles[1 - first].unwrap()
    assert settings() == before


def test_training_stays_within_the_accuracy_that_the_plan_states() -> None:
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    gradients, error = [], 0.0
    for policy in (None, "32-fast"):
        model = net()
        if policy is None:
            model.double()
        handle = wrap(model, None, policy) if policy else None
        nn.functional.cross_entropy(model(x if policy else x.double()), y).backward()
        gradients.append([p.grad.double() for p in model.parameters()])
        if handle is not None:
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            plain, error = backend_for("cpu").switches.errors(torch.device("cpu"))
            assert f"relative error {error:.1e} against float64, {plain:.1e} without" in str(handle.plan)
            handle.unwrap()
    # Three products in a row, of which the last gradient sees all, and cancellation in its sums.
    for mine, true in zip(gradients[1], gradients[0], strict=True):
        assert (mine - true).norm() <= 20 * error * true.norm()


def test_measured_error_is_that_of_a_product_by_hand() -> None:
    plain, fast = backend_for("cpu").switches.errors(torch.device("cpu"))
    a = torch.randn(256, 256)
    true = a.double() @ a.double()
    mine = float(((a @ a).double() - true).norm() / true.norm())
    # Another matrix, the same size: of the same order.
    assert plain / 10 < mine < plain * 10
    # bfloat16 proper would be 1e-3; less than float32's rounding is impossible.
    assert 2**-26 < fast < 1e-2


def test_resolve_leaves_the_switches_and_the_plan_round_trips() -> None:
    before = settings()
    plan = resolve(net(), "32-fast")
    assert settings() == before
    assert plan.facts and Plan.from_dict(plan.to_dict()) == plan


def test_rule_for_a_part_turns_them_on_too() -> None:
    before = settings()
    handle = wrap(net(), None, "bf16-mixed", rules=[Rule("2", "32-fast")])
    assert settings() == ["bf16"] * 3 and handle.plan.facts
    assert handle.plan.placement("2").precision.compute_dtype == "tf32"
    handle.unwrap()
    assert settings() == before


def test_setting_that_the_user_changes_while_wrapped_stays() -> None:
    before = settings()
    handle = wrap(net(), None, "32-fast")
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    try:
        handle.unwrap()
        assert settings() == [before[0], "ieee", before[2]]
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before[1]
    assert settings() == before


def test_unwrapped_copy_and_a_model_wrapped_in_between_leave_the_settings() -> None:
    before = settings()
    first = wrap(net(), None, "32-fast")
    with wrap(net(), None, "bf16-mixed"), wrap(net(), None, "32-fast") as second:
        first.unwrap()
        assert settings() == ["bf16"] * 3
        second.unwrap()
        assert settings() == before
    assert settings() == before


def test_failing_wrap_leaves_the_switches() -> None:
    before = settings()
    with pytest.raises(PolicyError):
        wrap([net(), net().to("meta")], None, "32-fast")
    assert settings() == before


def test_failing_switch_puts_the_others_back() -> None:
    class Stubborn:
        precision = property(lambda self: "old")

    good = SimpleNamespace(precision="old")
    switches = Switches((good, "precision", "fast"), (Stubborn(), "precision", "fast"))
    with pytest.raises(AttributeError):
        switches.turn_on()
    assert good.precision == "old"


def test_accuracy_without_is_measured_without_also_while_a_model_on_another_device_has_them_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thing = SimpleNamespace(precision="old")
    switches = Switches((thing, "precision", "fast"))
    monkeypatch.setattr(fast, "_error", lambda device: {"old": 1e-7, "fast": 1e-3}[thing.precision])
    off = switches.turn_on()
    assert switches.errors(torch.device("cuda", 1)) == (1e-7, 1e-3)
    assert thing.precision == "fast"
    off()
    assert thing.precision == "old"


def test_two_threads_turn_on_and_off_without_losing_the_old_value() -> None:
    thing = SimpleNamespace(precision="old")
    switches = Switches((thing, "precision", "fast"))

    def work() -> None:
        for _ in range(2000):
            off = switches.turn_on()
            assert thing.precision == "fast"
            off()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert thing.precision == "old"


def test_device_without_a_switch_is_refused_by_name() -> None:
    with pytest.raises(PolicyError) as caught:
        resolve(net(), "32-fast", device="mps")
    assert str(caught.value) == (
        "Expected a device with a switch for fast float32 products (cpu, cuda).\n"
        "Received: a policy that computes in tf32, on mps\n"
        "Remedy: use the policy 'bf16-mixed' or '32-true' there"
    )
