"""Nothing else changes: what wrap puts in place, what it takes up later, and that everything comes back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wrapprec
from wrapprec import AlreadyWrappedError, ModelChangedError, PolicyError, Rule

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

FOUR = ["16-mixed", "16-module", "bf16-mixed", "bf16-module"]
each_policy = pytest.mark.parametrize("policy", FOUR)
LOW = {
    "16-mixed": torch.float16,
    "16-module": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "bf16-module": torch.bfloat16,
}


class Notes(nn.Linear):
    """Notes the dtype it computes in."""

    computed: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.__dict__["computed"] = out.dtype
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Notes(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.second = Notes(8, 4)
        self.second.forward = self.second.forward  # type: ignore[method-assign]  # an instance's own, as accelerate sets
        self.first.register_forward_hook(_hook)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.normed(self.norm(self.first(x))))
        return out


def _hook(module: nn.Module, args: Any, out: Any) -> None:
    return None


def snapshot(model: nn.Module) -> list[Any]:
    """Every attribute of every module, by identity, tables opened."""
    found = []
    for name, module in model.named_modules():
        for key, value in sorted(module.__dict__.items()):
            if key == "computed":
                continue
            entry = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else None
            if isinstance(value, list):
                entry = [(str(i), id(v)) for i, v in enumerate(value)]
            found.append((name, key, type(value), id(value), entry))
    return found


def use(model: nn.Module, scale: float = 1e-3) -> None:
    model.eval()
    (model(torch.randn(4, 8)).float().mean() * scale).backward()
    model.zero_grad()


@each_policy
def test_unwrap_puts_every_attribute_of_every_module_back(policy: str) -> None:
    model = Model()
    model.eval()
    before = snapshot(model)
    x = torch.randn(4, 8)
    plain = model(x)
    before = snapshot(model)
    handle = wrapprec.wrap(model, policy=policy)
    assert snapshot(model) != before
    use(model)
    with torch.no_grad():
        model(x)
    handle.unwrap()
    assert snapshot(model) == before
    assert torch.equal(model(x), plain) and wrapprec.handle_of(model) is None
    handle.unwrap()
    assert snapshot(model) == before


@each_policy
def test_parameters_state_dict_and_keys_are_the_same_while_wrapped(policy: str) -> None:
    model = Model()
    names = [(name, id(p)) for name, p in model.named_parameters()]
    state = model.state_dict()
    wrapprec.wrap(model, policy=policy)
    use(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == names
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(now[k].data_ptr() == v.data_ptr() and now[k].dtype == v.dtype for k, v in state.items())
    model.load_state_dict(state)


@each_policy
def test_modes_outside_the_model_are_as_before(policy: str) -> None:
    model = Model()
    rng = torch.get_rng_state()
    wrapprec.wrap(model, policy=policy)
    assert torch.equal(torch.get_rng_state(), rng)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(torch.ones(4, 8))
            assert torch.is_grad_enabled() is grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert not torch.is_autocast_enabled("cpu") and torch.get_default_dtype() == torch.float32
    assert not torch.is_inference_mode_enabled()


def test_float32_policy_is_bit_identical_with_dropout_too() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy="32-true")
    results = []
    for model in (plain, mine):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(6, 8)).square().mean()
            loss.backward()
            optimizer.step()
        results.append([loss.detach(), *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Failures


@each_policy
@pytest.mark.parametrize(
    "options", [{"rules": [Rule("nothing*", "float32")]}, {"loss_scale": "nonsense"}, {"optimizer": "no optimizer"}]
)
def test_failure_in_wrap_leaves_nothing_behind(policy: str, options: dict[str, Any]) -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises((PolicyError, TypeError)):
        wrapprec.wrap(model, policy=policy, **options)
    assert snapshot(model) == before


@each_policy
def test_failure_in_the_second_model_leaves_nothing_on_the_first(policy: str) -> None:
    model, half = Model(), nn.Linear(8, 8).half()
    before = snapshot(model), snapshot(half)
    with pytest.raises(PolicyError, match=r"model\.float\(\)"):
        wrapprec.wrap([model, half], policy=policy)
    assert (snapshot(model), snapshot(half)) == before


def test_warning_turned_into_an_error_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from wrapprec import install

    def warn(*args: Any, **kwargs: Any) -> None:
        raise wrapprec.WrapprecWarning("planned")

    model = Model()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(install, "_place", lambda *args: (place(*args), warn()))
        with pytest.raises(wrapprec.WrapprecWarning):
            wrapprec.wrap(model, policy="bf16-mixed")
    assert snapshot(model) == before


place = wrapprec.install._place  # type: ignore[attr-defined]  # the module is loaded by the package


def test_wrapping_twice_or_a_part_is_refused_by_name() -> None:
    model = Model()
    handle = wrapprec.wrap(model, policy="bf16-mixed")
    for again in (model, model.first, nn.Sequential(model)):
        with pytest.raises(AlreadyWrappedError, match="unwrap"):
            wrapprec.wrap(again, policy="bf16-mixed")
    handle.unwrap()
    with pytest.raises(AlreadyWrappedError, match='"first"'):
        wrapprec.wrap([model, model.first], policy="16-mixed")
    assert "forward" not in model.__dict__


# Exceptions in forward


class Raises(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error, self.armed = nn.Linear(8, 8), error, True

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.armed:
            raise self.error
        return x


@each_policy
@pytest.mark.parametrize("error", [KeyError("planned"), KeyboardInterrupt(), SystemExit(), RuntimeError("planned")])
@pytest.mark.parametrize("rule", [None, "float32"])
def test_exception_in_a_nested_region_restores_everything(policy: str, error: BaseException, rule: str | None) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Raises(error), nn.LSTM(8, 8)))
    wrapprec.wrap(model, policy=policy, rules=[] if rule is None else [("1", rule), ("1.0", policy)])
    model(torch.randn(2, 8)) if (setattr(model[1][0], "armed", False)) else None
    use(nn.Sequential(model, Pick()))
    before = snapshot(model)
    model[1][0].armed = True
    before = snapshot(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(type(error)) as caught:
            model(torch.randn(2, 8))
        assert caught.value is error
        assert snapshot(model) == before and not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    model[1][0].armed = False
    use(nn.Sequential(model, Pick()))


class Pick(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        first: Tensor = pair[0]
        return first


@each_policy
def test_reset_closes_what_an_interrupt_left_open(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from wrapprec import scope

    model = Model()
    model.eval()
    handle = wrapprec.wrap(model, policy=policy)
    before = snapshot(model)
    close = scope.Scope.close

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scope.Scope, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(4, 8))
    assert scope.thread.scope is not None
    monkeypatch.setattr(scope.Scope, "close", close)
    handle.reset()
    assert scope.thread.scope is None and snapshot(model) == before
    handle.reset()
    use(model)


def test_interrupt_in_the_middle_of_closing_is_made_good_by_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    from wrapprec import scope

    model = Model()
    model.eval()
    handle = wrapprec.wrap(model, policy="16-module")
    before = snapshot(model)
    take_back, calls = scope.take_back, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        take_back(*args)

    monkeypatch.setattr(scope, "take_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(4, 8))
    assert snapshot(model) != before
    handle.reset()
    assert snapshot(model) == before and scope.thread.scope is None


# Changes after wrap


@each_policy
def test_half_after_wrap_is_refused_with_the_remedy_and_float_takes_it_back(policy: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    wrapprec.wrap(model, policy=policy)
    use(model)
    for convert in (model.half, model.bfloat16):
        convert()
        with pytest.raises(ModelChangedError, match=r"model\.float\(\)"):
            model(torch.randn(2, 8))
        model.float()
    use(model)


@each_policy
def test_frozen_low_precision_parameters_are_used_as_they_are(policy: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].to(LOW[policy]).requires_grad_(False)
    wrapprec.wrap(model, policy=policy, loss_scale=8 if policy.startswith("16") else None)
    assert model(torch.randn(2, 8)).dtype == torch.float32
    model(torch.randn(2, 8)).sum().backward()
    assert model[0].weight.dtype == LOW[policy] and model[0].weight.grad is None and model[1].weight.grad is not None


@each_policy
def test_added_and_replaced_modules_get_their_precision_at_the_next_forward(policy: str) -> None:
    model = nn.Sequential(Notes(8, 8), Notes(8, 8))
    handle = wrapprec.wrap(model, policy=policy, rules=[("1", "float32")])
    use(model)
    model[0], removed = Notes(8, 8), model[0]
    model.append(nn.Sequential(Notes(8, 8)))
    use(model)
    assert model[0].computed == LOW[policy] and model[1].computed == torch.float32
    assert model[2][0].computed == LOW[policy]
    assert [p.name for p in handle.plan.placements] == ["", "0", "1", "2", "2.0"]
    handle.unwrap()
    for module in (*model.modules(), removed):
        assert "forward" not in module.__dict__


@each_policy
def test_module_added_to_a_copy_is_taken_up_too(policy: str) -> None:
    model = nn.Sequential(Notes(8, 8))
    wrapprec.wrap(model, policy=policy)
    other = copy.deepcopy(model)
    other.append(Notes(8, 8))
    use(other)
    assert other[1].computed == LOW[policy] and len(model) == 1
    wrapprec.unwrap(other)
    assert "forward" not in other[1].__dict__ and "forward" not in other[0].__dict__ and "forward" in model.__dict__


@each_policy
def test_parametrisation_and_gradients_switched_after_wrap_are_taken_up(policy: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    wrapprec.wrap(model, policy=policy, loss_scale=8 if policy.startswith("16") else None)
    use(model)
    parametrizations.spectral_norm(model[0])
    model[1].weight.requires_grad_(False)
    model.train()
    model(torch.randn(4, 8)).square().mean().backward()
    assert model[0].parametrizations.weight.original.grad is not None and model[1].weight.grad is None


# Copies


@each_policy
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_precision_and_have_a_scale_of_their_own(policy: str, way: str) -> None:
    model = nn.Sequential(Notes(8, 8), nn.LayerNorm(8), Notes(8, 4))
    handle = wrapprec.wrap(model, policy=policy)
    use(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    other[0].computed = None
    x = torch.randn(4, 8)
    assert torch.equal(other(x), model(x)) and other[0].computed == LOW[policy]
    other(x).mean().mul(1e-3).backward()
    assert other[0].weight.grad is not None and not any(p is q for p in other.parameters() for q in model.parameters())
    theirs = wrapprec.handle_of(other)
    assert theirs is not None and theirs is not handle and theirs.scale == handle.scale
    if policy.startswith("16"):
        state = theirs.state_dict()
        state["scales"][0]["scale"] *= 2
        theirs.load_state_dict(state)
        assert theirs.scale == 2 * handle.scale
    theirs.unwrap()
    assert "forward" not in other.__dict__ and "forward" in model.__dict__
    assert other(x).dtype == torch.float32 and other[0].computed == torch.float32


@each_policy
def test_copy_of_a_submodule_does_not_drag_the_model_along_and_works(policy: str) -> None:
    model = nn.Sequential(nn.Sequential(Notes(8, 8)), nn.Linear(8, 1000))
    wrapprec.wrap(model, policy=policy)
    use(model)
    part = copy.deepcopy(model[0])
    assert len(pickle.dumps(part)) < len(pickle.dumps(model)) / 2
    use(part)
    assert part[0].computed == LOW[policy]
    part.append(Notes(8, 8))
    use(part)
    assert part[1].computed == LOW[policy]


def test_copy_made_after_an_output_of_a_local_class_can_be_pickled() -> None:
    class Local(tuple[Any, ...]):
        pass

    model = Tupled()
    model.kind = Local  # type: ignore[assignment]
    wrapprec.wrap(model, policy="16-mixed")
    model(torch.randn(2, 8))
    model.kind = tuple
    pickle.dumps(model)


class Tupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), tuple

    def forward(self, x: Tensor) -> Any:
        return self.kind([self.layer(x)])


def test_averaged_model_follows_a_wrapped_one() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    wrapprec.wrap(model, policy="bf16-module")
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update_parameters(model)
    average.update_parameters(model)
    assert average(torch.randn(2, 8)).dtype == torch.float32


@pytest.mark.parametrize("parametrised", [False, True])
def test_dropped_model_is_collected(parametrised: bool) -> None:
    model = Model()
    if not parametrised:
        model.normed = nn.Linear(8, 8)
    handle = wrapprec.wrap(model, policy="16-module")
    use(model)
    gone = weakref.ref(model), weakref.ref(model.first.weight)
    del model, handle
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


class Renormalising(nn.Linear):
    """Writes into its weight in forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.div_(2 * self.weight.norm())
        return super().forward(x)


def test_weight_that_is_changed_in_forward_is_not_lost() -> None:
    model = nn.Sequential(Renormalising(8, 8), nn.Linear(8, 2))
    wrapprec.wrap(model, policy="bf16-module")
    with pytest.raises(ModelChangedError, match="float32"):
        model(torch.randn(2, 8))
    wrapprec.unwrap(model)
    wrapprec.wrap(model, policy="bf16-module", rules=[("0", "float32")])
    model(torch.randn(2, 8))
    torch.testing.assert_close(model[0].weight.norm(), torch.tensor(0.5))
