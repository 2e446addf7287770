"""What `test_ddp` checks, run by every process of a group; the reference is one process on the whole batch in FP32."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.parallel.distributed import _MixedPrecision

import wrapprec
from wrapprec import LossScale
from wrapprec.backends.base import Lending
from wrapprec.backends.cpu import CpuBackend

_PATIENCE = datetime.timedelta(seconds=60)
"""For a collective that another process does not come to."""
_ALL_CHECKS = datetime.timedelta(minutes=10)
"""For all that one group of processes checks, which takes a minute or so on two busy cores."""

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
ORDERS = ["wrap(DDP)", "DDP(wrapped)", "wrap(ddp.module)"]
ROWS = 8  # of each rank

CHECKS: dict[str, Callable[[str], None]] = {}
"""By name; each takes a policy, and raises where it fails. All processes run them in the same order."""


def check(function: Callable[[str], None]) -> Callable[[str], None]:
    CHECKS[function.__name__] = function
    return function


def marking(checks: dict[str, Callable[[str], None]]) -> Callable[..., Any]:
    """A decorator for checks that take long, or do not depend on the policy: they run with the policies given only."""

    def check_with(*policies: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
        def mark(function: Callable[[str], None]) -> Callable[[str], None]:
            function.policies = list(policies)  # type: ignore[attr-defined]
            checks[function.__name__] = function
            return function

        return mark

    return check_with


def run(folder: Path, processes: int, names: list[str], checks: dict[str, Callable[[str], None]]) -> dict[str, str]:
    """What came of each check: starting processes takes seconds, so those of one group run them all."""
    arguments = processes, names, str(folder / "rendezvous"), str(folder), checks
    with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):
        mp.spawn(main, arguments, nprocs=processes)
    outcomes: dict[str, str] = {}
    for report in (folder / str(rank) for rank in range(processes)):
        for name, outcome in torch.load(report).items() if report.exists() else ():
            outcomes[name] = outcome if outcomes.get(name, "passed") == "passed" else outcomes[name]
    return outcomes


def policies_of(function: Callable[[str], None]) -> list[str]:
    """The policies that a check is run with."""
    policies: list[str] = getattr(function, "policies", POLICIES)
    return policies


def main(
    rank: int, world: int, names: list[str], rendezvous: str, reports: str, checks: dict[str, Callable[[str], None]]
) -> None:
    """Run the checks in one process and save what came of each."""
    torch.set_num_threads(1)
    # Ranks that wait for each other in different groups: their own patience is 30 minutes.
    faulthandler.dump_traceback_later(_ALL_CHECKS.total_seconds(), exit=True)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "float16 on a CPU without float16 instructions")
    warnings.filterwarnings("ignore", "fp8 is emulated")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=_PATIENCE)
    outcome: dict[str, str] = {}
    for name in names:
        for policy in policies_of(checks[name]):
            torch.manual_seed(0)
            try:
                checks[name](policy)
                outcome[f"{name} {policy}"] = "passed"
            except Exception:
                # The processes may be out of step now: what comes after would be no evidence.
                outcome[f"{name} {policy}"] = f"rank {rank}: {traceback.format_exc()}"
                torch.save(outcome, f"{reports}/{rank}")
                raise
    torch.save(outcome, f"{reports}/{rank}")
    leave()


def leave() -> None:
    """End a process of a group, once all are ready to, without finalising Python.

    DDP and FSDP keep the group, so that destroying it does not end gloo's threads. One that lets go of its last tensor
    while the interpreter is finalised is ended by it, and takes the process down ("terminate called").
    """
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


# Models, data, comparison


class Net(nn.Module):
    """Layers, a norm, and a head that is used only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.last, self.extra = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = torch.tanh(self.second(x))
        return self.extra(x) + self.last(x) if extra else self.last(x)


def net(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(1)
    return kind()


def data(step: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """The whole batch of one step, the same on every rank."""
    generator = torch.Generator().manual_seed(7 + step)
    total = rows * dist.get_world_size()
    return torch.randn(total, 8, generator=generator), torch.randn(total, 4, generator=generator)


def mine(tensor: Tensor, rows: int = ROWS) -> Tensor:
    """This rank's share of the whole batch."""
    return tensor[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


def build(order: str, policy: str, model: nn.Module, optimizer: bool = True, **options: Any) -> Any:
    """(DDP, optimizer, handle), put together in one of the orders; `loss_scale` is for wrap, the rest for DDP."""
    loss_scale = options.pop("loss_scale", None)
    fused = options.pop("fused", False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scale: dict[str, Any] = {} if loss_scale is None or policy.startswith("bf16") else {"loss_scale": loss_scale}
    if order == "DDP(wrapped)":
        handle = wrapprec.wrap(model, sgd, policy, **scale)
        return DDP(model, **options), sgd, handle
    ddp = DDP(model, **options)
    return ddp, sgd, wrapprec.wrap(ddp if order == "wrap(DDP)" else ddp.module, sgd, policy, **scale)


def tolerance(policy: str) -> float:
    # Of a whole gradient's norm: eight roundings on the way through four layers and back, each of half a unit.
    if policy.startswith("fp8"):
        return 0.2  # As in `sidebyside`.
    return 8 * (2**-8 if policy.startswith("bf16") else 2**-11)


def near(given: dict[str, Tensor | None], wanted: dict[str, Tensor | None], bound: float) -> None:
    """Each gradient is within `bound` of the wanted one, relative to its norm; None where None is wanted."""
    assert given.keys() == wanted.keys()
    for name, want in wanted.items():
        got = given[name]
        assert (got is None) == (want is None), f"{name}: {got}, wanted {want}"
        if got is not None and want is not None:
            assert got.dtype is torch.float32
            error = float((got - want).norm() / want.norm())
            assert error < bound, f"{name}: {error}, {got}, wanted {want}"


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same_everywhere(*tensors: Tensor) -> None:
    """Bit-identical on all ranks."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    rows = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, flat)
    assert all(torch.equal(row, rows[0]) for row in rows), rows


def agreed(handle: Any, model: nn.Module) -> None:
    """Parameters, the scale's whole state and the verdicts are the same on all ranks."""
    same_everywhere(*model.parameters())
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, (handle.state_dict(), handle.step_was_skipped, handle.skipped_steps))
    assert all(state == states[0] for state in states), states


def reference(batches: list[tuple[Tensor, Tensor]], extra: bool = False) -> dict[str, Tensor | None]:
    """Gradients of the mean over the whole batch in FP32, one process, summed over `batches`."""
    model = net()
    for x, y in batches:
        F.mse_loss(model(x, extra), y).backward()
    return grads(model)


# Gradients


@check
def gradients_are_the_mean(policy: str) -> None:
    wanted = reference([data()])
    for order in ORDERS:
        for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"bucket_cap_mb": 1e-4}):
            model = net()
            model.extra = nn.Identity()
            ddp, optimizer, handle = build(order, policy, model, **options)
            x, y = data()
            expected = {k: v for k, v in wanted.items() if not k.startswith("extra")}
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(ddp(mine(x)), mine(y)).backward()
                near(grads(model), expected, tolerance(policy))
            optimizer.step()
            agreed(handle, model)
            assert not handle.step_was_skipped
            handle.unwrap()


@check
def fp8_gradients_are_the_mean(policy: str) -> None:
    if policy == POLICIES[0]:  # Once: it has a policy of its own.
        gradients_are_the_mean("fp8-mixed")


@check
def unused_parameters_keep_no_gradient(policy: str) -> None:
    wanted, both = reference([data()]), reference([data()], extra=True)
    for order in ORDERS:
        for options in (
            {"find_unused_parameters": True},
            {"find_unused_parameters": True, "gradient_as_bucket_view": True},
        ):
            model = net()
            ddp, optimizer, handle = build(order, policy, model, **options)
            x, y = data()
            for extra in (False, True, False):
                optimizer.zero_grad()
                F.mse_loss(ddp(mine(x), extra), mine(y)).backward()
                near(grads(model), both if extra else wanted, tolerance(policy))
            handle.unwrap()


class Uneven(nn.Module):
    """One module with parameters of which a forward uses a part: they are lent together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.ways = nn.ParameterList([torch.randn(8, 4) / 3 for _ in range(3)])

    def forward(self, x: Tensor, way: int) -> Tensor:
        return x @ self.ways[0] + x @ self.ways[way]


@check
def unused_parameters_of_a_used_module_keep_no_gradient(policy: str) -> None:
    for order in ORDERS:
        model, plain = net(Uneven), net(Uneven)
        ddp, _, handle = build(order, policy, model, loss_scale=256.0, find_unused_parameters=True)
        x, y = data()
        for way in (1, 2):
            # Ranks may differ in what they use: then all have the mean, of which some give nothing.
            way = 1 + (way + dist.get_rank()) % 2 if way == 2 else way
            model.zero_grad()
            F.mse_loss(ddp(mine(x), way), mine(y)).backward()
            near(grads(model), uneven_reference(plain, x, y, way), tolerance(policy))
        handle.unwrap()


def uneven_reference(plain: nn.Module, x: Tensor, y: Tensor, way: int) -> dict[str, Tensor | None]:
    ways: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ways, way)
    plain.zero_grad()
    for rank, its in enumerate(ways):
        part = slice(rank * ROWS, (rank + 1) * ROWS)
        (F.mse_loss(plain(x[part], its), y[part]) / len(ways)).backward()
    return grads(plain)


# Accumulation


@check
def no_sync_accumulates_before_the_mean(policy: str) -> None:
    batches = [data(0), data(1), data(2)]
    wanted = reference(batches)
    for order in ORDERS:
        model = net()
        ddp, optimizer, handle = build(order, policy, model, find_unused_parameters=True)
        for _ in range(2):
            optimizer.zero_grad()
            with ddp.no_sync():
                for x, y in batches[:-1]:
                    F.mse_loss(ddp(mine(x)), mine(y)).backward()
            x, y = batches[-1]
            F.mse_loss(ddp(mine(x)), mine(y)).backward()
            near(grads(model), wanted, tolerance(policy))
        optimizer.step()
        agreed(handle, model)
        handle.unwrap()


# Overflow


def backward(ddp: nn.Module, bad: bool, step: int = 0) -> None:
    """A backward of this rank's share, with gradients past float16's range if `bad`."""
    x, y = data(step)
    (F.mse_loss(ddp(mine(x)), mine(y)) * (2.0**24 if bad else 1.0)).backward()


def hide_overflow(model: nn.Module) -> None:
    """As clipping may: after it, only the rank that overflowed itself could know."""
    for param in model.parameters():
        if param.grad is not None:
            param.grad.nan_to_num_(0.0, 1.0, -1.0).clamp_(-1.0, 1.0)


# Without annotations: DDP compares them with types, and here they are strings.
def hides_inf(state, bucket):  # type: ignore[no-untyped-def]
    """A communication hook after which nothing of an overflow is to be seen in the gradients."""
    tensor = bucket.buffer().nan_to_num_(0.0, 0.0, 0.0).div_(dist.get_world_size())
    future = dist.all_reduce(tensor, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def in_bf16(state, bucket):  # type: ignore[no-untyped-def]
    """torch's own, which DDP takes by its own name only where NCCL is."""
    return bf16_compress_hook(dist.group.WORLD, bucket)


HOOKS = {"none": None, "bf16": in_bf16, "fp16": fp16_compress_hook, "hides inf": hides_inf}


@check
def overflow_on_one_rank_skips_on_all(policy: str) -> None:
    scales = policy.startswith("16")
    for order in ORDERS:
        for name, hook in HOOKS.items():
            for fused in (False, True) if name in ("none", "hides inf") else (False,):
                model = net()
                model.extra = nn.Identity()
                scale = LossScale(init_scale=64.0, growth_interval=2)
                ddp, optimizer, handle = build(order, policy, model, loss_scale=scale, fused=fused)
                if hook is not None:
                    ddp.register_comm_hook(None, hook)
                for step, bad in enumerate([None, 0, 1, None, None]):
                    before = [p.detach().clone() for p in model.parameters()]
                    optimizer.zero_grad()
                    backward(ddp, bad == dist.get_rank(), step)
                    hide_overflow(model)
                    optimizer.step()
                    agreed(handle, model)
                    overflowed = scales and bad is not None
                    assert handle.step_was_skipped is overflowed, (order, name, step)
                    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
                    assert same is overflowed, (order, name, step)
                # Halved twice, and doubled after two good steps.
                assert handle.scale == (32.0 if scales else 1.0)
                handle.unwrap()


@check
def overflow_of_one_ranks_input_lowers_the_scale_on_all(policy: str) -> None:
    """The gradient of an input is no other rank's business, but the scale is."""
    scales = policy.startswith("16")
    for order in ORDERS:
        model = nn.Linear(8, 4)
        nn.init.constant_(model.weight, 3e4)
        ddp, optimizer, handle = build(order, policy, model, loss_scale=LossScale(init_scale=64.0))
        # The weight's gradient is 0 then; an input's is the sum of four times 64 * 3e4, past float16's range.
        x = torch.zeros(ROWS, 8, requires_grad=dist.get_rank() == 0)
        (ddp(x).mean() * 4 * ROWS).backward()
        optimizer.step()
        agreed(handle, model)
        assert not handle.step_was_skipped
        assert handle.scale == (32.0 if scales else 1.0)
        handle.unwrap()


@check
def step_of_a_fused_optimizer_reads_nothing_on_the_host(policy: str) -> None:
    def refuse(*_: Tensor) -> list[float]:
        raise AssertionError("read on the host")

    for order in ORDERS:
        model = net()
        model.extra = nn.Identity()
        ddp, optimizer, handle = build(order, policy, model, loss_scale=LossScale(init_scale=64.0), fused=True)
        CpuBackend.read, before = refuse, CpuBackend.read
        try:
            for bad in (False, True, False):
                optimizer.zero_grad()
                backward(ddp, bad and dist.get_rank() == 0)
                optimizer.step()
        finally:
            CpuBackend.read = before
        agreed(handle, model)
        assert handle.scale == (32.0 if policy.startswith("16") else 1.0)
        handle.unwrap()


@check
def rank_without_a_backward_agrees(policy: str) -> None:
    scales = policy.startswith("16")
    for bad in (False, True):
        for order in ORDERS:
            model = net()
            model.extra = nn.Identity()
            scale = LossScale(init_scale=64.0, growth_interval=1)
            ddp, optimizer, handle = build(order, policy, model, loss_scale=scale)
            if dist.get_rank() == 0:
                with ddp.no_sync():
                    backward(ddp, bad)
                if not bad or not scales:
                    optimizer.zero_grad()  # else weights would differ: nothing has been reduced
            optimizer.step()
            agreed(handle, model)
            assert handle.step_was_skipped is (scales and bad)
            assert handle.scale == ((32.0 if bad else 128.0) if scales else 1.0)
            handle.unwrap()


@check
def part_that_only_one_rank_uses_agrees(policy: str) -> None:
    """The wrapped model is a part of what DDP holds, and other ranks never enter it."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.rest = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(x) + self.part(x) if dist.get_rank() == 0 else self.rest(x)

    scales = policy.startswith("16")
    model = net(Outer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parameters outside the wrapped part
        scale = {"loss_scale": LossScale(init_scale=64.0, growth_interval=2)} if scales else {}
        handle = wrapprec.wrap(model.part, optimizer, policy, **scale)
    ddp = DDP(model, find_unused_parameters=True)
    for bad in (False, True, False, False):
        optimizer.zero_grad()
        backward(ddp, bad and dist.get_rank() == 0)
        hide_overflow(model)
        optimizer.step()
        agreed(handle, model)
        assert handle.step_was_skipped is (bad and scales)
    assert handle.scale == (64.0 if scales else 1.0)


@check
def processes_that_share_no_model_do_not_wait_for_each_other(policy: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, policy)
    for step in range(1 + dist.get_rank()):
        backward(model, bad=dist.get_rank() == 0, step=step)
        optimizer.step()
    assert handle.step_was_skipped is (dist.get_rank() == 0 and policy.startswith("16"))


# Uneven inputs


@check
def uneven_inputs_with_join(policy: str) -> None:
    """Ranks run out of inputs at different times; a rank overflows when others have, and gradients are clipped."""
    scales, rank, world = policy.startswith("16"), dist.get_rank(), dist.get_world_size()
    batches = [1, 3, 3, 4][:world]
    for order in ORDERS:
        model, plain = net(), net()
        model.extra = plain.extra = nn.Identity()
        before = [p.detach().clone() for p in model.parameters()]
        ddp, optimizer, handle = build(order, policy, model, loss_scale=LossScale(init_scale=64.0))
        theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        with ddp.join():
            for step in range(batches[rank]):
                optimizer.zero_grad()
                backward(ddp, scales and step == rank == 1, step)
                hide_overflow(model)
                optimizer.step()
                assert handle.step_was_skipped is (scales and step == 1), step
        for step in range(max(batches)):
            theirs.zero_grad()
            x, y = data(step)
            for one in (one for one in range(world) if step < batches[one]):
                part = slice(one * ROWS, (one + 1) * ROWS)
                (F.mse_loss(plain(x[part]), y[part]) / world).backward()
            if not (scales and step == 1):
                theirs.step()
        same_everywhere(*model.parameters())
        moved = {str(i): p.detach() - q for i, (p, q) in enumerate(zip(model.parameters(), before, strict=True))}
        wanted = {str(i): p.detach() - q for i, (p, q) in enumerate(zip(plain.parameters(), before, strict=True))}
        near(moved, wanted, tolerance(policy))
        # Whoever ran out early takes over the scale at the next step.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle.attach(optimizer)
        backward(ddp, scales and rank == 0)
        hide_overflow(model)
        optimizer.step()
        same_everywhere(*model.parameters(), torch.tensor(handle.scale), torch.tensor(handle.step_was_skipped))
        assert handle.scale == (16.0 if scales else 1.0)
        handle.unwrap()


# Overlap


class Tower(nn.Module):
    """Says when the gradient has come down to each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.events: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            x.register_hook(lambda grad, number=number: self.events.append(f"gradient of layer {number}"))
        return x[:, :4]


def events_of(order: str, policy: str | None) -> list[str]:
    """In one backward, once DDP has settled its buckets, each of which holds one layer."""
    model = net(Tower)
    names = {id(p): name for name, p in model.named_parameters()}

    def records(state, bucket):  # type: ignore[no-untyped-def]
        model.events.append(f"ready: {sorted(names[id(p)] for p in bucket.parameters())}")
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    options = {"bucket_cap_mb": 280 / 2**20}  # of the 288 bytes of a layer
    ddp = DDP(model, **options) if policy is None else build(order, policy, model, loss_scale=64.0, **options)[0]
    ddp.register_comm_hook(None, records)
    for _ in range(3):
        model.events.clear()
        backward(ddp, bad=False)
    return model.events


def _ready(events: list[str]) -> list[str]:
    return [event for event in events if event.startswith("ready")]


@check
def buckets_are_ready_when_they_are_without_wrapprec(policy: str) -> None:
    plain = events_of("", None)
    assert len(plain) == 10 and plain.index("gradient of layer 2") > min(map(plain.index, _ready(plain))), plain
    for order in ORDERS:
        assert events_of(order, policy) == plain, order


@contextlib.contextmanager
def lent_in_large_buckets(elements: int) -> Iterator[None]:
    """As where one pass for many weights pays: on CUDA."""
    before = CpuBackend.lending
    CpuBackend.lending = Lending(elements, multi_tensor=True)
    try:
        yield
    finally:
        CpuBackend.lending = before


@check
def large_buckets_overlap_too(policy: str) -> None:
    """With two layers to a bucket, the upper ones' gradients are on their way before backward is at the lowest."""
    with lent_in_large_buckets(140):  # of the 144 elements of two layers
        for order in ORDERS:
            events = events_of(order, policy)
            ready = next(i for i, event in enumerate(events) if "layers.2.weight" in event)
            assert ready < events.index("gradient of layer 1"), (order, events)


@check
def large_buckets_leave_unused_parameters_alone(policy: str) -> None:
    with lent_in_large_buckets(2**22):
        unused_parameters_keep_no_gradient(policy)
        unused_parameters_of_a_used_module_keep_no_gradient(policy)


@check
def large_buckets_of_a_static_graph_leave_unused_parameters_alone(policy: str) -> None:
    with lent_in_large_buckets(2**22):
        static_graph_leaves_unused_parameters_alone(policy)


@check
def static_graph_leaves_unused_parameters_alone(policy: str) -> None:
    wanted = reference([data()])
    for order in ORDERS:
        model = net()
        ddp, optimizer, handle = build(order, policy, model, static_graph=True, find_unused_parameters=True)
        for _ in range(3):
            optimizer.zero_grad()
            backward(ddp, bad=False)
            near(grads(model), wanted, tolerance(policy))
        handle.unwrap()


# Buffers, direct calls, several models, closures


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@check
def buffers_are_those_of_rank_0(policy: str) -> None:
    """DDP broadcasts buffers before forward: statistics of a batch norm are rank 0's, on every rank."""
    plain = net(Normed)
    for step in range(2):
        plain(data(step)[0][:ROWS])
    for order in ORDERS:
        model = net(Normed)
        ddp, _, handle = build(order, policy, model, loss_scale=64.0)
        for step in range(2):
            backward(ddp, bad=False, step=step)
        buffers, wanted = dict(model.named_buffers()), dict(plain.named_buffers())
        assert all(b.dtype is wanted[name].dtype for name, b in buffers.items())
        if dist.get_rank() == 0:
            statistics = ("norm.running_mean", "norm.running_var")
            near({k: buffers[k] for k in statistics}, {k: wanted[k] for k in statistics}, tolerance(policy))
        ddp._sync_buffers()
        same_everywhere(*buffers.values())
        handle.unwrap()


@check
def module_inside_can_be_called_directly(policy: str) -> None:
    """As for validation on one rank: no collective, and the same numbers."""
    plain = net()
    x, _ = data()
    for order in ORDERS:
        model = net()
        ddp, _, handle = build(order, policy, model, find_unused_parameters=True)
        backward(ddp, bad=False)
        if dist.get_rank() == 0:
            model.zero_grad()
            plain.zero_grad()
            out = ddp.module(x)
            assert out.dtype is torch.float32
            near({"out": out.detach()}, {"out": plain(x).detach()}, tolerance(policy))
            with torch.no_grad():
                near({"out": ddp.module(x)}, {"out": plain(x).detach()}, tolerance(policy))
        dist.barrier()
        handle.unwrap()


@check
def models_of_one_handle_agree_each_on_its_scale(policy: str) -> None:
    """A GAN's: the discriminator overflows on one rank while the generator's optimizer steps."""
    scales = policy.startswith("16")
    for wraps_first in (False, True):
        torch.manual_seed(3)
        generator, judge = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), Limit(dist.get_rank() == 0))
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, judge)]
        models: list[Any] = [generator, judge]
        options: dict[str, Any] = {"loss_scale": LossScale(init_scale=64.0)} if scales else {}
        if wraps_first:
            handle = wrapprec.wrap(models, optimizers, policy, **options)
        models = [DDP(generator), DDP(judge)]
        if not wraps_first:
            handle = wrapprec.wrap(models, optimizers, policy, **options)
        x = mine(data()[0])
        models[1](models[0](x)).mean().backward()
        hide_overflow(generator)
        optimizers[0].step()
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, (handle.state_dict(), handle.step_was_skipped))
        assert all(state == states[0] for state in states), states
        same_everywhere(*generator.parameters())
        assert handle.step_was_skipped is scales
        assert handle.scales[1] == (32.0 if scales else 1.0)
        handle.unwrap()


class Limit(nn.Module):
    """Identity; where it is on, what a loss scale has enlarged overflows in backward."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        if self.on and x.requires_grad:
            x.register_hook(lambda grad: torch.where(grad.abs() > 0.1, torch.inf, grad))
        return x


@check
def closures_are_evaluated_equally_often(policy: str) -> None:
    for order in ORDERS:
        for kind in (torch.optim.SGD, torch.optim.LBFGS):
            model = net()
            model.extra = nn.Identity()
            ddp, _, handle = build(order, policy, model, loss_scale=LossScale(init_scale=64.0))
            optimizer = kind(model.parameters(), lr=0.1)
            handle.attach(optimizer)
            evaluations = 0

            def closure() -> Tensor:
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad()  # noqa: B023
                bad = evaluations == 1 and dist.get_rank() == 0 and policy.startswith("16")
                backward(ddp, bad)  # noqa: B023
                hide_overflow(model)  # noqa: B023
                # An LBFGS looks at the loss, which is each rank's own.
                return torch.tensor(1.0)

            optimizer.step(closure)
            agreed(handle, model)
            same_everywhere(torch.tensor(evaluations))
            assert handle.scale == (32.0 if policy.startswith("16") else 1.0)
            handle.unwrap()


@check
def only_processes_of_the_same_group_agree(policy: str) -> None:
    scales, half = policy.startswith("16"), dist.get_world_size() // 2
    groups = [dist.new_group(list(part), timeout=_PATIENCE) for part in (range(half), range(half, 2 * half))]
    number = dist.get_rank() // half
    model = net()
    model.extra = nn.Identity()
    options = {"process_group": groups[number], "loss_scale": LossScale(init_scale=64.0)}
    ddp, optimizer, handle = build("DDP(wrapped)", policy, model, **options)
    for step in range(2):
        optimizer.zero_grad()
        backward(ddp, step == dist.get_rank() == 0)
        hide_overflow(model)
        optimizer.step()
    assert handle.scale == ((32.0 if number == 0 else 64.0) if scales else 1.0)


@check
def parts_with_groups_of_their_own_agree_whichever_is_entered_first(policy: str) -> None:
    """Ranks meet the groups in other orders, which torch allows where it rebuilds no buckets: nobody waits for ever."""
    scales, rank = policy.startswith("16"), dist.get_rank()
    model = net(Pair)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scale: dict[str, Any] = {"loss_scale": LossScale(init_scale=64.0)} if scales else {}
    handle = wrapprec.wrap(model, optimizer, policy, **scale)
    everybody = list(range(dist.get_world_size()))
    groups = [dist.new_group(everybody, timeout=_PATIENCE) for _ in range(2)]
    both = zip(model.children(), groups, strict=True)
    parts = [DDP(part, process_group=group, find_unused_parameters=True) for part, group in both]
    x, y = data()
    for bad in (False, True):
        optimizer.zero_grad()
        out = sum(part(mine(x)) for part in (parts if rank == 0 else parts[::-1]))
        (F.mse_loss(out, mine(y)) * (2.0**24 if bad and rank == 1 else 1.0)).backward()
        hide_overflow(model)
        optimizer.step()
        agreed(handle, model)
        assert handle.step_was_skipped is (bad and scales)
    handle.unwrap()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 4), nn.Linear(8, 4)


@check
def sharded_optimizer_skips_on_all(policy: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of torch.jit.script
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = net()
    model.extra = nn.Identity()
    ddp = DDP(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    scales = policy.startswith("16")
    handle = wrapprec.wrap(ddp, optimizer, policy, **({"loss_scale": LossScale(init_scale=64.0)} if scales else {}))
    for step in range(3):
        optimizer.zero_grad()
        backward(ddp, scales and step == 1 and dist.get_rank() == 0, step)
        before = [p.detach().clone() for p in model.parameters()]
        hide_overflow(model)
        optimizer.step()
        agreed(handle, model)
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert handle.step_was_skipped is same is (scales and step == 1)


@check
def post_local_sgd_skips_on_all_and_averages(policy: str) -> None:
    """A shell that steps another optimizer and then averages the weights: the other one is guarded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of torch.jit.script
        from torch.distributed.optim import PostLocalSGDOptimizer
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    def make() -> Any:
        model = net()
        model.extra = nn.Identity()
        ddp = DDP(model)
        alone, _ = dist.new_subgroups(1)
        ddp.register_comm_hook(PostLocalSGDState(None, alone, start_localSGD_iter=2), post_localSGD_hook)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return ddp, sgd, PostLocalSGDOptimizer(sgd, PeriodicModelAverager(period=2, warmup_steps=2))

    scales = policy.startswith("16")
    (ddp, sgd, shell), (plain, _, its) = make(), make()
    names = set(sgd.__dict__), set(shell.__dict__)
    handle = wrapprec.wrap(ddp, shell, policy, **({"loss_scale": LossScale(init_scale=64.0)} if scales else {}))
    for step in range(6):
        bad = scales and step == 3
        before = [p.detach().clone() for p in ddp.parameters()]
        for one, optimizer in ((ddp, shell), (plain, its)):
            optimizer.zero_grad()
            # From the second on, gradients stay where they are: the overflow is one rank's alone.
            backward(one, bad and one is ddp and dist.get_rank() == 1, step)
            if not bad or one is ddp:
                optimizer.step()
            else:
                its.averager.average_parameters(its.param_groups)
        verdicts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(verdicts, (handle.step_was_skipped, handle.state_dict()))
        assert all(verdict == verdicts[0] for verdict in verdicts)
        assert handle.step_was_skipped is bad
        assert all(map(torch.equal, ddp.parameters(), before)) is bad
        if step % 2 == 0:
            same_everywhere(*ddp.parameters())
    for got, want, start in zip(ddp.parameters(), plain.parameters(), net().parameters(), strict=False):
        assert (got - want).norm() < tolerance(policy) * (want - start).norm()
    handle.unwrap()
    assert names == (set(sgd.__dict__), set(shell.__dict__))


@check
def compiled_models_have_true_gradients_and_skip_on_all(policy: str) -> None:
    """`torch.compile` of the DDP, which splits the graph by its buckets, or of the model below it."""
    from torch import _dynamo

    _dynamo.reset()
    scales = policy.startswith("16")
    model = net()
    model.extra = nn.Identity()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scale: dict[str, Any] = {"loss_scale": LossScale(init_scale=64.0)} if scales else {}
    handle = wrapprec.wrap(model, sgd, policy, **scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it traces
        outer = policy.endswith("mixed")
        ddp = torch.compile(DDP(model), backend="eager") if outer else DDP(torch.compile(model, backend="eager"))
        x, y = data()
        F.mse_loss(ddp(mine(x)), mine(y)).backward()
    wanted = {name: g for name, g in reference([data()]).items() if g is not None}
    near(grads(model), wanted, tolerance(policy))
    sgd.step()
    agreed(handle, model)
    sgd.zero_grad()
    backward(ddp, scales and dist.get_rank() == 1, 1)
    before = [p.detach().clone() for p in model.parameters()]
    hide_overflow(model)
    sgd.step()
    agreed(handle, model)
    assert handle.step_was_skipped is scales
    assert all(map(torch.equal, model.parameters(), before)) is scales
    handle.unwrap()
    _dynamo.reset()


@check
def ddp_that_casts_by_itself_is_refused(policy: str) -> None:
    model = net()
    ddp = DDP(model)
    # Not by its argument: with that, torch 2.9 wants an accelerator for its streams.
    ddp.mixed_precision = _MixedPrecision(param_dtype=torch.float16)
    try:
        wrapprec.wrap(ddp, None, policy)
    except wrapprec.WrapprecError as error:
        assert "Expected a DistributedDataParallel that leaves precision to wrapprec" in str(error), error
        assert "leave mixed_precision out" in str(error)
        assert "forward" not in ddp.__dict__ and "forward" not in model.__dict__
    else:
        raise AssertionError("not refused")


# accelerate


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """What `torchrun` tells a process; gives accelerate, which warns of its own when it is imported."""
    before = dict(os.environ)
    numbers = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(), "LOCAL_RANK": dist.get_rank()}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    # The group exists already: nobody will ask for the address.
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="unused", OMP_NUM_THREADS="1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import accelerate
    try:
        yield accelerate
    finally:
        os.environ.clear()
        os.environ.update(before)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


@check
def accelerator_keeps_everything_true(policy: str) -> None:
    """`prepare` after `wrap`, `backward`, `accumulate`, `clip_grad_norm_`, a scheduler, `save_state`, `load_state`."""
    scales = policy.startswith("16")
    with launched() as accelerate:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net()
        model.extra = nn.Identity()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        options: dict[str, Any] = {"loss_scale": LossScale(init_scale=64.0)} if scales else {}
        handle = wrapprec.wrap(model, optimizer, policy, scheduler=scheduler, **options)
        ddp, adam, schedule = accelerator.prepare(model, optimizer, scheduler)
        assert isinstance(ddp, DDP)
        wanted = {k: g / 2 for k, g in reference([data(0), data(1)]).items() if g is not None}
        for overflow in (False, True):
            for step in range(2):
                with accelerator.accumulate(ddp):
                    x, y = data(step)
                    bad = scales and overflow and step == dist.get_rank() == 0
                    accelerator.backward(F.mse_loss(ddp(mine(x)), mine(y)) * (2.0**24 if bad else 1.0))
                    if accelerator.sync_gradients and not overflow:
                        near(grads(model), wanted, tolerance(policy))
                        norm = torch.stack([g.norm() for g in wanted.values()]).norm()
                        near({"": accelerator.clip_grad_norm_(ddp.parameters(), 0.1)}, {"": norm}, tolerance(policy))
                    if accelerator.sync_gradients:
                        hide_overflow(model)
                    adam.step()
                    schedule.step()
                    adam.zero_grad()
            agreed(handle, model)
            assert handle.step_was_skipped is (scales and overflow)
            # accelerate advances the scheduler once for each process.
            times = dist.get_world_size() * (1 if scales or not overflow else 2)
            assert scheduler.get_last_lr() == [0.01 * 0.5**times]
        folders = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folders)
        accelerator.save_state(folders[0])
        saved = handle.state_dict()
        assert handle.scale == (32.0 if scales else 1.0)
        if scales:
            handle.load_state_dict({**saved, "scales": [{**saved["scales"][0], "scale": 2.0}], "skipped_steps": 9})
        accelerator.wait_for_everyone()
        accelerator.load_state(folders[0])
        assert handle.state_dict() == saved
        handle.unwrap()


@check
def accelerator_that_has_prepared_before_wrap_keeps_everything_true(policy: str) -> None:
    """What `prepare` returns is given to `wrap`, the scheduler that was built on it too, or a later optimizer's."""
    scales = policy.startswith("16")
    for attached in (False, True):
        with launched() as accelerate:
            accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
            model = net()
            model.extra = nn.Identity()
            ddp, adam = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
            schedule = torch.optim.lr_scheduler.StepLR(adam, 1, gamma=0.5)
            options: dict[str, Any] = {"loss_scale": LossScale(init_scale=64.0)} if scales else {}
            handle = wrapprec.wrap(ddp, *(() if attached else (adam,)), policy=policy, **options)
            handle.attach(adam, schedule)
            wanted = {k: g / 2 for k, g in reference([data(0), data(1)]).items() if g is not None}
            for overflow in (False, True):
                for step in range(2):
                    with accelerator.accumulate(ddp):
                        x, y = data(step)
                        bad = scales and overflow and step == dist.get_rank() == 0
                        accelerator.backward(F.mse_loss(ddp(mine(x)), mine(y)) * (2.0**24 if bad else 1.0))
                        if accelerator.sync_gradients:
                            if not overflow:
                                near(grads(model), wanted, tolerance(policy))
                            hide_overflow(model)
                        adam.step()
                        adam.zero_grad()
                schedule.step()
                agreed(handle, model)
                assert handle.step_was_skipped is (scales and overflow)
            assert schedule.get_last_lr() == [0.01 * 0.5 ** (1 if scales else 2)]
            folders = [tempfile.mkdtemp()]
            dist.broadcast_object_list(folders)
            accelerator.save_state(folders[0])
            saved = handle.state_dict()
            if scales:
                handle.load_state_dict({**saved, "scales": [{**saved["scales"][0], "scale": 2.0}], "skipped_steps": 9})
            accelerator.wait_for_everyone()
            accelerator.load_state(folders[0])
            assert handle.state_dict() == saved
            handle.unwrap()
            assert not {"step", "zero_grad"} & adam.optimizer.__dict__.keys()


@check
def accelerator_with_a_precision_of_its_own_is_refused(policy: str) -> None:
    with launched() as accelerate:
        accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = net()
        try:
            wrapprec.wrap(model, None, policy)
        except wrapprec.WrapprecError as error:
            assert "Expected an Accelerator that leaves precision to wrapprec" in str(error), error
            assert "Received: Accelerator(mixed_precision='bf16')" in str(error), error
            assert 'build Accelerator(mixed_precision="no")' in str(error), error
        else:
            raise AssertionError("not refused")
