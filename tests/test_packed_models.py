"""What stays of a model while its weights are quantised, what comes back, and what is saved and loaded."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantised import Net, each_form, gradients, in_float64, net, trained
from test_sizes import kept
from torch import Tensor, nn

import wrapprec
from wrapprec import PolicyError
from wrapprec.lowbit import fourbits, quantised
from wrapprec.lowbit.sizes import stored_bytes

pytest.importorskip("bitsandbytes")


def reachable(model: nn.Module) -> int:
    """The bytes of every tensor's storage that the model's parameters, buffers and packed weights hold."""
    plain = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    packed = [p for p in model.parameters() if not p.is_floating_point()]
    return sum(plain.values()) + sum(kept(p) - p.untyped_storage().nbytes() for p in packed)


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything about the modules that must be as before, tensors apart."""
    found = []
    for name, module in model.named_modules():
        own = {key: value for key, value in module.__dict__.items() if not key.startswith("_")}
        hooks = [len(value) for key, value in module.__dict__.items() if key.endswith("_hooks") and value is not None]
        found.append((name, module, type(module), list(module.__dict__), own, hooks, dict(module._parameters)))
    return found


@each_form
def test_modules_parameters_and_hooks_are_the_same_objects_after_unwrap(form: str) -> None:
    model = net()
    model.first.base.note = "mine"
    calls = []
    model.first.base.register_forward_hook(lambda *args: calls.append("forward"))
    before, names = snapshot(model), [name for name, _ in model.named_parameters()]
    handle = wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), form)
    assert [name for name, _ in model.named_parameters()] == names
    assert [m for _, m in model.named_modules()] == [module for _, module, *_ in before]
    model(torch.randn(2, 48))
    assert calls == ["forward"] and model.first.base.note == "mine"
    reference = in_float64(model)
    handle.unwrap()
    assert snapshot(model) == before
    assert all(p.dtype is torch.float32 for p in model.parameters())
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(got, want.float()) and got.requires_grad == want.requires_grad


def test_layers_are_those_of_bitsandbytes_while_wrapped() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64)).requires_grad_(False)
    wrapprec.wrap(model, policy="nf4", rules=[("1", "int8")])
    assert type(model[0]) is bitsandbytes.nn.Linear4bit and type(model[0].weight) is bitsandbytes.nn.Params4bit
    assert type(model[1]) is bitsandbytes.nn.Linear8bitLt and type(model[1].weight) is bitsandbytes.nn.Int8Params


@each_form
def test_float32_weights_are_freed_whoever_holds_the_parameters(form: str) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 128)).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    storages = [weakref.ref(p.untyped_storage()) for p in (model[0].weight, model[1].weight)]
    params = list(model.parameters())
    full = reachable(model)
    handle = wrapprec.wrap(model, optimizer, form)
    gc.collect()
    assert [p.untyped_storage().nbytes() for p in params if p.dim() == 1 and not p.numel()] == [0, 0]
    assert all(storage() is None for storage in storages)
    biases = 4 * (256 + 128)
    assert reachable(model) == stored_bytes(form, (256, 256)) + stored_bytes(form, (128, 256)) + biases
    assert reachable(model) < (0.27 if form == "int8" else 0.16) * full
    handle.unwrap()
    assert reachable(model) == full
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))


@each_form
def test_backward_keeps_no_unpacked_weight(form: str) -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 64)).requires_grad_(False)
    wrapprec.wrap(model, policy=form)
    made: list[weakref.ref[Tensor]] = []
    x = torch.randn(2, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t.shape) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = model(x)
    assert torch.Size((64, 96)) not in made and torch.Size((64, 64)) not in made
    out.sum().backward()
    assert x.grad is not None


@each_form
def test_the_plan_foresees_the_bytes_of_the_weights(form: str) -> None:
    model = mixed(0)
    model.tok = nn.Embedding(16, 64).requires_grad_(False)
    handle = wrapprec.wrap(model, policy=form, rules=[("tok", "nf4-dq")])
    memory = handle.plan.memory()
    assert memory.weights == reachable(model)
    adapters = sum(p.numel() for p in trained(model))
    assert (memory.trained, memory.gradients) == (adapters, 4 * adapters)
    assert memory.elements == 48 * 64 + 64 + 64 * 16 + 16 + 128 + 16 * 64 + adapters


# A transaction


def test_a_failure_half_way_leaves_every_weight_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Embedding(4, 64)).requires_grad_(False)
    before, weights = snapshot(model), {name: t.clone() for name, t in model.state_dict().items()}
    pack, calls = fourbits.Linear4.pack, []

    def fail(self: Any, weight: Tensor) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("seeded")
        return pack(self, weight)

    monkeypatch.setattr(fourbits.Linear4, "pack", fail)
    with pytest.raises(MemoryError, match="seeded"):
        wrapprec.wrap(model, policy="nf4", rules=[("3", "nf4")])
    assert snapshot(model) == before
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_a_failure_after_quantising_leaves_every_weight_bit_by_bit() -> None:
    model, other = nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 64)
    weight = model.weight.detach().clone()
    with pytest.raises(PolicyError, match="Expected frozen weights"):
        wrapprec.wrap([model, other], torch.optim.SGD(other.parameters(), lr=0.1), "nf4")
    assert type(model) is nn.Linear and torch.equal(model.weight, weight)


def test_unwrapping_after_the_user_put_another_weight_in_keeps_theirs() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).requires_grad_(False)
    handle = wrapprec.wrap(model, policy="nf4")
    mine = model[0].weight = nn.Parameter(torch.randn(8, 64))
    x = torch.randn(2, 64)
    want = x @ mine.T + model[0].bias
    assert (model(x) - want).norm() <= 2**-6 * want.norm()
    handle.unwrap()
    assert model[0].weight is mine and type(model[0]) is nn.Linear


# Changes after wrap


def test_layers_that_come_after_wrap_are_quantised_at_the_next_forward() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    handle = wrapprec.wrap(model, policy="nf4")
    model[1] = nn.Linear(64, 8).requires_grad_(False)
    new = model[1].weight
    model(torch.randn(2, 64))
    assert model[1].weight.dtype is torch.uint8 and new.numel() == 0
    assert handle.plan.placement("0").params == 64 * 64 + 64
    handle.unwrap()
    assert model[1].weight is new and new.shape == (8, 64)


def test_adapters_that_come_after_wrap_train_in_float32() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    handle = wrapprec.wrap(model, policy="nf4")
    model.append(nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    handle.attach(optimizer)
    model(torch.randn(2, 64)).sum().backward()
    assert model[2].weight.grad is not None and model[2].weight.dtype is torch.float32


def test_casting_the_model_leaves_packed_weights_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    wrapprec.wrap(model, policy="nf4-dq")
    x = torch.randn(2, 64)
    want = model(x)
    assert torch.equal(model.float().to("cpu")(x), want)


# Copies


@each_form
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_unwrap_by_themselves(form: str, how: str) -> None:
    model = net()
    wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), form)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    x = torch.randn(2, 48)
    want, grads = model(x), gradients(model, x)
    assert torch.equal(twin(x), want)
    assert all(torch.equal(value, grads[name]) for name, value in gradients(twin, x).items())
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    plain = in_float64(model)
    wrapprec.unwrap(twin)
    assert type(twin.first.base) is nn.Linear and not twin.first.base._load_state_dict_pre_hooks
    assert torch.equal(twin.first.base.weight, plain.first.base.weight.float())
    assert torch.equal(model(x), want)


# Saving and loading


def mixed(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net()
    model.tok = nn.Embedding(16, 48).requires_grad_(False)
    return model


@each_form
@pytest.mark.parametrize("assign", [False, True])
def test_a_saved_model_loads_into_one_that_is_wrapped_the_same_way(form: str, assign: bool, tmp_path: Path) -> None:
    rules = [("tok", "nf4-dq")]
    model, other = mixed(0), mixed(1)
    wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), form, rules=rules)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    handle = wrapprec.wrap(other, torch.optim.SGD(trained(other), lr=0.1), form, rules=rules)
    held = {name: p for name, p in other.named_parameters() if not p.is_floating_point()}
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert all(other.get_parameter(name) is p for name, p in held.items())
    x, ids = torch.randn(2, 48), torch.arange(16)
    assert torch.equal(other(x), model(x)) and torch.equal(other.tok(ids), model.tok(ids))
    assert gradients(other, x).keys() == gradients(model, x).keys()
    # What was loaded is the model's own.
    for name, value in state.items():
        if "base.weight" in name or not assign:  # `assign` takes what is not quantised as it is
            value.zero_()
    assert torch.equal(other(x), model(x))
    handle.unwrap()
    assert torch.equal(other.first.base.weight, in_float64(model).first.base.weight.float())


def test_the_keys_are_those_of_bitsandbytes() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8), nn.Embedding(8, 64)).requires_grad_(False)
    wrapprec.wrap(model, policy="nf4-dq", rules=[("1", "int8"), ("2", "nf4")])
    packed = ["weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"]
    nested = ["weight.nested_absmax", "weight.nested_quant_map"]
    want = {f"0.{key}" for key in ("weight", "bias", *packed, *nested)}
    want |= {f"1.{key}" for key in ("weight", "bias", "SCB", "weight_format")}
    want |= {f"2.{key}" for key in ("weight", *packed)}
    assert set(model.state_dict()) == want


@each_form
def test_safetensors_holds_what_is_saved(form: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = mixed(0)
    wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), form, rules=[("tok", "fp4-dq")])
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = safetensors.load_file(tmp_path / "model.safetensors")
    x = torch.randn(2, 48)
    want = model(x)
    model.load_state_dict(mixed(1).state_dict())
    assert not torch.equal(model(x), want)
    model.load_state_dict(state)
    assert torch.equal(model(x), want)


@each_form
def test_a_float32_checkpoint_is_quantised_when_it_is_loaded(form: str) -> None:
    source, model = mixed(0), mixed(1)
    wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), form, rules=[("tok", "nf4")])
    model.load_state_dict(source.state_dict())
    wrapprec.wrap(source, torch.optim.SGD(trained(source), lr=0.1), form, rules=[("tok", "nf4")])
    x = torch.randn(2, 48)
    assert torch.equal(model(x), source(x)) and torch.equal(model.tok.weight, source.tok.weight)


@pytest.mark.parametrize(
    ("saved", "received"),
    [
        ("nf4-dq", "a packed weight with absmax, nested_absmax, nested_quant_map"),
        ("fp4", "a packed weight with absmax, quant_map, quant_state.bitsandbytes__fp4"),
        ("int8", "a packed weight with SCB, weight_format"),
    ],
)
def test_another_format_is_refused_and_changes_nothing(saved: str, received: str) -> None:
    source, model = (nn.Sequential(nn.Linear(64, 8)).requires_grad_(False) for _ in range(2))
    wrapprec.wrap(source, policy=saved)
    wrapprec.wrap(model, policy="nf4")
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(source.state_dict())
    assert "Expected a float weight of shape (8, 64), or one saved as nf4, for '0.weight'" in str(caught.value)
    assert received in str(caught.value)
    assert "wrap with the policy that it was saved under" in str(caught.value)
    assert torch.equal(model[0].weight, before)


def test_weights_of_another_shape_and_not_finite_ones_are_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).requires_grad_(False)
    wrapprec.wrap(model, policy="nf4")
    state = nn.Sequential(nn.Linear(32, 8)).state_dict()
    with pytest.raises(RuntimeError, match=r"Received: a float weight of shape \(8, 32\)"):
        model.load_state_dict(state)
    state = nn.Sequential(nn.Linear(64, 8)).state_dict()
    state["0.weight"][0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="Received: a weight with inf or nan"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.bias": torch.zeros(8)})
    assert model.load_state_dict({"0.bias": torch.zeros(8)}, strict=False).missing_keys == ["0.weight"]


def test_a_quantised_checkpoint_does_not_load_into_a_plain_model() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).requires_grad_(False)
    with wrapprec.wrap(model, policy="nf4"):
        state = model.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)


def test_the_handles_state_is_plain_and_resumes() -> None:
    model = net()
    handle = wrapprec.wrap(model, torch.optim.SGD(trained(model), lr=0.1), "nf4")
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    handle.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))


def test_release_is_what_gives_the_numbers_up() -> None:
    # Seeds the mistake that a transaction must not make: giving numbers up before all is done.
    model = nn.Sequential(nn.Linear(64, 8)).requires_grad_(False)
    true = model[0].weight.detach().clone()
    handle = wrapprec.wrap(model, policy="nf4")
    quantised.release(model)  # twice does nothing more
    handle.unwrap()
    assert not torch.equal(model[0].weight, true)
    assert (model[0].weight - true).norm() < 0.12 * true.norm()


@pytest.mark.parametrize("first", ["DDP", "wrap"])
@pytest.mark.parametrize("form", ["nf4-dq", "int8"])
def test_ddp_trains_the_adapters_of_a_quantised_base(form: str, first: str, tmp_path: Path) -> None:
    plain = net()
    optimizer = torch.optim.SGD(trained(plain), lr=0.1)
    wrapprec.wrap(plain, optimizer, form)
    x = torch.randn(3, 48)
    want = gradients(plain, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = net()
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        if first == "wrap":
            wrapprec.wrap(model, optimizer, form)
        ddp = nn.parallel.DistributedDataParallel(model)
        if first == "DDP":
            wrapprec.wrap(ddp, optimizer, form)
        got = gradients(ddp, x)
        assert {name.removeprefix("module."): value for name, value in got.items()}.keys() == want.keys()
        assert all(torch.equal(value, want[name.removeprefix("module.")]) for name, value in got.items())
    finally:
        torch.distributed.destroy_process_group()
