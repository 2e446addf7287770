"""nn.DataParallel around a wrapped model, and wrapped itself, its replicas made by torch's own code on the CPU."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wrapprec
from wrapprec import LossScale, Rule, ScaleLeakError, wrap

# `torch.nn.parallel.replicate` is the function of this name.
replicate_module = sys.modules["torch.nn.parallel.replicate"]

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
SCALED = ["16-mixed", "16-module"]
# Eight roundings of the compute dtype, in the norm of a gradient.
TOLERANCE = {"16-mixed": 8 * 2**-11, "16-module": 8 * 2**-11, "bf16-mixed": 8 * 2**-8, "bf16-module": 8 * 2**-8}


class Broadcast(torch.autograd.Function):
    """What torch.nn.parallel._functions.Broadcast does: one node for all tensors, each copied once for each device."""

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.number = number
        return tuple(t.clone() for _ in range(number) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        each = len(grads) // ctx.number
        return (None, *(sum(grads[i::each]) for i in range(each)))


def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    if not tensors:
        return []
    if detach:
        # The first device has the tensors themselves: its replica writes the statistics of the original.
        return [[t if device == 0 else t.detach().clone() for t in tensors] for device in devices]
    copies = Broadcast.apply(len(devices), *tensors)
    return [list(copies[i : i + len(tensors)]) for i in range(0, len(copies), len(tensors))]


class OnCpu(nn.DataParallel):
    """nn.DataParallel with its own forward and `replicate`; the devices are threads."""

    def __init__(self, module: nn.Module, number: int = 2) -> None:
        super().__init__(module)
        self.device_ids = list(range(number))
        self.dim, self.output_device, self.src_device_obj = 0, 0, torch.device("cpu")
        self.after: Callable[[list[Any]], None] | None = None

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        parts = [x.chunk(len(device_ids)) for x in inputs]
        return list(zip(*parts, strict=True)), [kwargs] * len(device_ids)

    def parallel_apply(self, replicas: Any, inputs: Any, kwargs: Any) -> list[Any]:
        grad, found, errors = torch.is_grad_enabled(), [None] * len(replicas), []

        def work(index: int) -> None:
            torch.set_grad_enabled(grad)
            try:
                found[index] = replicas[index](*inputs[index], **kwargs[index])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(replicas))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        if errors:
            raise errors[0]
        if self.after is not None:
            self.after(replicas)
        return found

    def gather(self, outputs: Any, output_device: Any) -> Any:
        return torch.cat(outputs)


@pytest.fixture(autouse=True)
def _replicates_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replicate_module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicate_module, "_get_device_index", lambda device, *_: device)
    yield


class Block(nn.Module):
    """Its own parameter, a norm with buffers, a tied weight, and a record of the dtypes that it computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.full((8,), 0.1))
        self.gain = nn.Parameter(torch.ones(8))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        self.seen.append(out.dtype)
        return self.second(torch.tanh(self.norm(out)) + self.shift) * self.gain


class Net(nn.Module):
    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.block = Block()
        self.middle = nn.Identity() if middle is None else middle
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.block(x)))  # type: ignore[no-any-return]


class Last(nn.Module):
    """An LSTM, and its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[:, None])[0][:, -1]  # type: ignore[no-any-return]


class Again(nn.Module):
    """A block that is computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def both(net: nn.Module, policy: str, place: str, **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    """DataParallel in float32, and with `net` wrapped inside it or wrapped itself."""
    plain, mine = OnCpu(copy.deepcopy(net)), OnCpu(net)
    handle = wrap(net if place == "inside" else mine, policy=policy, **options)
    return plain, mine, handle


def close(mine: Tensor, true: Tensor, policy: str, times: int = 1) -> bool:
    return mine.dtype == true.dtype and bool((mine - true).norm() <= times * TOLERANCE[policy] * true.norm() + 1e-7)


@torch.no_grad()
def hooked() -> nn.Module:
    """A weight that a hook computes before forward; so far without a graph, which could not be copied."""
    module = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)))
    module(torch.zeros(1, 8))
    return module


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "plain": nn.Identity,
    "lstm": Last,
    "checkpoint": lambda: Again(False),
    "reentrant": lambda: Again(True),
    "hooked": hooked,
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["inside", "around"])
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_replicas_give_the_gradients_of_float32(policy: str, place: str, middle: str) -> None:
    plain, mine, _ = both(Net(MIDDLES[middle]()), policy, place)
    x = torch.randn(8, 8)
    for _ in range(2):
        outs, inputs = [], []
        for model in (plain, mine):
            inputs.append(x.clone().requires_grad_())
            outs.append(model(inputs[-1]))
            outs[-1].square().mean().backward()
        assert close(outs[1], outs[0], policy, times=2)
        # BatchNorm over four rows takes differences of nearly equal gradients: twice the roundings, and what comes
        # before it again.
        assert close(inputs[1].grad, inputs[0].grad, policy, times=4)
        for (name, true), got in zip(plain.named_parameters(), mine.parameters(), strict=True):
            # The bias before a BatchNorm has no influence: its true gradient is zero but for rounding.
            if name != "module.block.first.bias":
                assert close(got.grad, true.grad, policy, times=4), name
        for true, got in zip(plain.buffers(), mine.buffers(), strict=True):
            # The first replica writes the running statistics, which are rounded as the activations are.
            assert torch.allclose(got.float(), true.float(), rtol=0.05, atol=0.02)
    low = torch.bfloat16 if policy.startswith("bf16") else torch.float16
    assert set(mine.module.block.seen) == {low} and len(mine.module.block.seen) == 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["inside", "around"])
def test_replicas_evaluate_without_gradients_and_leave_nothing(policy: str, place: str) -> None:
    plain, mine, handle = both(Net(), policy, place)
    before = {name: id(p) for name, p in mine.named_parameters()}
    keys = [set(module.__dict__) for module in mine.modules()]
    forwards = [module.__dict__.get("forward") for module in mine.modules()]
    x = torch.randn(8, 8)
    plain.eval(), mine.eval()
    with torch.no_grad():
        true = plain(x)
        assert close(mine(x), true, policy, times=2)
    with handle.frozen():
        assert close(mine(x), true, policy, times=2) and close(mine.module(x), true, policy, times=2)
        assert all(not hasattr(p, "_former_parameters") for p in mine.modules())
    assert {name: id(p) for name, p in mine.named_parameters()} == before
    assert [set(module.__dict__) for module in mine.modules()] == keys
    assert [module.__dict__.get("forward") for module in mine.modules()] == forwards
    out = mine.module(x)
    out.sum().backward()
    assert close(out, true, policy, times=2) and mine.module.head.weight.grad is not None
    handle.unwrap()
    assert torch.equal(mine(x), true)


@pytest.mark.parametrize("policy", SCALED)
@pytest.mark.parametrize("place", ["inside", "around"])
def test_overflow_in_one_replica_skips_the_step_although_clipping_hides_it(policy: str, place: str) -> None:
    mine = OnCpu(Net())
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9)
    handle = wrap(mine if place == "around" else mine.module, optimizer, policy, loss_scale=LossScale(init_scale=2**10))
    before = [p.detach().clone() for p in mine.parameters()]
    x = torch.randn(8, 8)
    # Past float16's range in the second replica only, whichever records last.
    weight = torch.ones(8, 1)
    weight[4:] = 1e6
    (mine(x) * weight).sum().backward()
    torch.nn.utils.clip_grad_value_(mine.parameters(), 1.0)
    for p in mine.parameters():
        p.grad.nan_to_num_()
    optimizer.step()
    assert handle.step_was_skipped and handle.scale == 2**9
    assert all(torch.equal(p, b) for p, b in zip(mine.parameters(), before, strict=True))
    optimizer.zero_grad()
    mine(x).square().mean().backward()
    optimizer.step()
    assert not handle.step_was_skipped and not torch.equal(mine.module.head.weight, before[-2])


@pytest.mark.parametrize("policy", SCALED)
@pytest.mark.parametrize("place", ["inside", "around"])
def test_overflow_of_gradients_that_were_dropped_skips_nothing(policy: str, place: str) -> None:
    mine = OnCpu(Net())
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    handle = wrap(mine if place == "around" else mine.module, optimizer, policy, loss_scale=2**10)
    x = torch.randn(8, 8)
    (mine(x) * 1e6).sum().backward()
    for p in mine.parameters():
        p.grad = None
    mine(x).square().mean().backward()
    optimizer.step()
    assert not handle.step_was_skipped


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["inside", "around"])
def test_training_with_replicas_follows_float32(policy: str, place: str) -> None:
    net = Net()
    plain, mine = OnCpu(copy.deepcopy(net)), OnCpu(net)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (plain, mine)]
    wrap(net if place == "inside" else mine, optimizers[1], policy)
    x, y = torch.randn(16, 8), torch.randn(16, 3)
    for step in range(8):
        losses = []
        for model, optimizer in zip((plain, mine), optimizers, strict=True):
            optimizer.zero_grad()
            # Both halves, and now and then only one, so that there is one replica.
            rows = 8 if step % 3 == 2 else 16
            loss = nn.functional.mse_loss(model(x[:rows]), y[:rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        # Eight steps, each with the roundings of one.
        assert losses[1] == pytest.approx(losses[0], rel=8 * TOLERANCE[policy])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["inside", "around"])
def test_replicas_are_freed_without_the_garbage_collector(policy: str, place: str) -> None:
    _, mine, _ = both(Net(), policy, place)
    refs: list[Any] = []

    def look(replicas: list[nn.Module]) -> None:
        refs.extend(weakref.ref(m) for r in replicas for m in r.modules())
        refs.extend(weakref.ref(t) for r in replicas for t in r.head._former_parameters.values())

    mine.after = look
    gc.collect()
    gc.disable()
    try:
        mine(torch.randn(8, 8)).sum().backward()
        # As in plain torch: a copy of all weights must not stay until a collection.
        assert refs and all(ref() is None for ref in refs)
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", POLICIES)
def test_replicas_of_a_model_changed_after_wrap_run_as_planned(policy: str) -> None:
    plain, mine, _ = both(Net(), policy, "inside")
    new = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    plain.module.middle, mine.module.middle = copy.deepcopy(new), new
    x = torch.randn(8, 8)
    plain(x).square().mean().backward()
    mine(x).square().mean().backward()
    for true, got in zip(plain.module.middle.parameters(), new.parameters(), strict=True):
        assert close(got.grad, true.grad, policy, times=4)


@pytest.mark.parametrize("policy", POLICIES)
def test_wrapped_model_within_a_replicated_container_and_a_rule_work(policy: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.extra = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            # The head is called directly, too: a scope of its own on a part of the replica.
            return self.extra(self.net(x)) + self.net.head(x)[:, :2]  # type: ignore[no-any-return]

    outer = Outer()
    plain, mine = OnCpu(copy.deepcopy(outer)), OnCpu(outer)
    wrap(outer.net, policy=policy, rules=[Rule("head", "float32")])
    x = torch.randn(8, 8)
    plain(x).square().mean().backward()
    mine(x).square().mean().backward()
    for name in ("extra.weight", "net.head.weight", "net.block.gain", "net.block.second.bias"):
        true, got = plain.module.get_parameter(name).grad, outer.get_parameter(name).grad
        assert close(got, true, policy, times=4), name


@pytest.mark.parametrize("policy", SCALED)
@pytest.mark.parametrize("place", ["inside", "around"])
def test_gradient_penalty_through_replicas_is_true(policy: str, place: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    plain, mine, _ = both(net, policy, place, loss_scale=2**8)
    x = torch.randn(8, 8)
    grads = []
    for model in (plain, mine):
        inside = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inside).sum(), inside, create_graph=True)
        grads.append(torch.autograd.grad(slope.square().sum(), model.parameters(), allow_unused=True))
    for true, got in zip(*grads, strict=True):
        if true is not None and true.abs().max() > 0:
            assert close(got, true, policy, times=4)


@pytest.mark.parametrize("policy", SCALED)
def test_frozen_weights_in_replicas_pass_the_gradient_of_the_input(policy: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)
    for place in ("inside", "around"):
        plain, mine, handle = both(net, policy, place, loss_scale=2**8)
        x = torch.randn(8, 8)
        grads = []
        for model in (plain, mine):
            given = x.clone().requires_grad_()
            model(given).sum().backward()
            grads.append(given.grad)
        assert close(grads[1], grads[0], policy, times=2)
        handle.unwrap()


@pytest.mark.parametrize("policy", SCALED)
def test_leak_out_of_a_replica_is_found_and_named(policy: str) -> None:
    kept: list[Tensor] = []

    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            kept.append(out)
            return out.sum()[None]

    mine = OnCpu(Leaks())
    wrap(mine.module, policy=policy)
    out = mine(torch.randn(8, 8))
    with pytest.raises(ScaleLeakError, match=r"wrapprec\.leave"):
        (out.sum() + kept[0].float().sum()).backward()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["inside", "around"])
def test_data_parallel_without_devices_is_the_module(policy: str, place: str) -> None:
    net = Net()
    plain = copy.deepcopy(net)
    mine = nn.DataParallel(net)
    if mine.device_ids:
        pytest.skip("there are devices")
    wrap(net if place == "inside" else mine, policy=policy)
    x = torch.randn(8, 8)
    plain(x).square().mean().backward()
    mine(x).square().mean().backward()
    assert close(net.head.weight.grad, plain.head.weight.grad, policy, times=2)
    assert wrapprec.handle_of(mine) is not None
