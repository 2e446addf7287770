"""Long runs leave nothing behind: objects, tensors and memory stay flat, and what is dropped is freed."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import gc
import itertools
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wrapprec
from wrapprec import LossScale, Rule, audit, border, recompute
from wrapprec.current import thread

# Dynamo's own, on its way to trace a Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
_REAL = torch.autograd._engine_run_backward  # type: ignore[attr-defined]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 2)
        self.kind = 0
        self.aux: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.norm(self.first(x)))
        if self.kind == 1:
            out = checkpoint(self.part, out, use_reentrant=False)
        elif self.kind == 2:
            out = checkpoint(self.part, out, use_reentrant=True)
        else:
            out = self.part(out)
        if self.kind == 3:
            raise KeyError("planned")
        self.aux = out.square().mean()
        return self.head(out)  # type: ignore[no-any-return]


def fail(grad: Tensor) -> None:
    raise KeyError("planned")


class Run:
    """A loop with all that may leave something behind, in turns."""

    def __init__(self, policy: str) -> None:
        self.net = Net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        # It grows and backs off all the time.
        scale = LossScale(init_scale=2.0**10, growth_interval=7) if policy.startswith("16") else None
        self.handle = wrapprec.wrap(self.net, self.optimizer, policy, loss_scale=scale)
        self.x, self.y = torch.randn(3, 4), torch.randn(3, 2)
        self.turns: list[Callable[[], None]] = [
            *[self.train] * 4,
            self.overflow,
            self.evaluate,
            functools.partial(self.train, kind=1),
            functools.partial(self.train, kind=2),
            self.raise_in_forward,
            self.raise_in_backward,
            self.abandon,
            self.accumulate,
            self.penalty,
            self.thread,
            self.train,
        ]

    def loss(self) -> Tensor:
        loss: Tensor = nn.functional.mse_loss(self.net(self.x), self.y)
        assert self.net.aux is not None
        return loss + 0.1 * self.net.aux

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=next(self.count) % 2 == 0)

    count = itertools.count()

    def train(self, kind: int = 0) -> None:
        self.net.kind = kind
        self.loss().backward()
        self.net.kind = 0
        self.step()

    def overflow(self) -> None:
        (self.loss() * 1e30).backward()
        torch.nn.utils.clip_grad_value_(self.net.parameters(), 1.0)
        for param in self.net.parameters():
            if param.grad is not None:
                param.grad.nan_to_num_()
        self.step()

    def evaluate(self) -> None:
        self.net.eval()
        with torch.no_grad():
            self.net(self.x)
        with self.handle.frozen():
            self.net(self.x)
        self.net.train()

    def raise_in_forward(self) -> None:
        self.net.kind = 3
        with contextlib.suppress(KeyError):
            self.net(self.x)
        self.net.kind = 0

    def raise_in_backward(self) -> None:
        removed = self.net.first.weight.register_hook(fail)
        with contextlib.suppress(KeyError):
            self.loss().backward()
        removed.remove()
        self.optimizer.zero_grad()

    def abandon(self) -> None:
        self.loss().backward()
        for param in self.net.parameters():
            param.grad = None
        self.loss()

    def accumulate(self) -> None:
        for _ in range(3):
            self.loss().backward()
        self.step()

    def penalty(self) -> None:
        x = self.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).square().sum(), x, create_graph=True)
        (slope.square().sum() + self.loss()).backward()
        self.step()

    def thread(self) -> None:
        worker = threading.Thread(target=self.train)
        worker.start()
        worker.join()

    def go(self, steps: int) -> None:
        for turn in itertools.islice(itertools.cycle(self.turns), steps):
            turn()


def living() -> collections.Counter[type]:
    gc.collect()
    return collections.Counter(type(obj) for obj in gc.get_objects() if not is_of_abstract_class(obj))


def is_of_abstract_class(obj: Any) -> bool:
    """Whether it is how Python remembers that `isinstance` asked an abstract class about a type: once for each two."""
    if type(obj) is weakref.ref:
        return isinstance(obj(), type)
    return type(obj) is types.BuiltinFunctionType and obj.__name__ == "_destroy"


def resident() -> float:
    """Memory of this process in MiB; zero where it cannot be told."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0.0
    return int(pages) * 4096 / 2**20


@pytest.mark.parametrize("policy", POLICIES)
def test_two_thousand_steps_leave_objects_tensors_and_memory_flat(policy: str) -> None:
    run = Run(policy)
    # All turns twice, the audits and their first thousand forwards are for warming up.
    run.go(30)
    before, memory = living(), resident()
    run.go(2000)
    after, grown = living(), resident() - memory
    more = {kind.__name__: after[kind] - before[kind] for kind in after if after[kind] > before[kind]}
    # Scopes with a reentrant checkpoint are remembered where there is no loss scale: the latest 512.
    assert more.pop("Extent", 0) <= recompute._REMEMBERED
    # Caches of torch and Python itself may take a few; one object in each of the rarest turns would be 130.
    assert max(more.values(), default=0) <= 40, more
    tensors = sum(number for kind, number in (after - before).items() if issubclass(kind, Tensor))
    assert tensors <= 2, more
    # A kilobyte a step would be 2 MiB; the allocator keeps up to a few of what it was given.
    assert grown < 8, f"{grown:.1f} MiB"
    _check_nothing_is_kept(run.handle)


def _check_nothing_is_kept(handle: Any) -> None:
    assert thread.scope is None
    # The backward that raised last may wait for the next forward.
    assert len(border.running) <= 1 and len(border._threads) <= 2
    for shared in handle._models:
        assert len(shared.buckets) <= 6 and len(shared.retired) <= 6 and len(shared.warned) <= 2
        assert len(shared.schedule.known) <= 4 and all(len(bucket.tasks) <= 2 for bucket in shared.buckets)
        if shared.scaler is not None:
            assert len(shared.scaler.borders) <= 1 and len(shared.scaler.peers) <= 1
        for module in shared.root().modules():
            assert type(module._parameters) is dict


DROPS: dict[str, Callable[[Run], Any]] = {
    "trained": lambda run: run.train(),
    "after everything": lambda run: run.go(30),
    "unwrapped": lambda run: run.handle.unwrap(),
    "before any forward": lambda run: None,
    "while an audit is due": lambda run: run.net(run.x),
    "after an exception in forward": lambda run: run.raise_in_forward(),
    "after an exception in backward": lambda run: run.raise_in_backward(),
    "after frozen": lambda run: run.evaluate(),
    "copied": lambda run: copy.deepcopy(run.net)(run.x).sum().backward(),
    "with a new optimizer": lambda run: run.handle.attach(torch.optim.SGD(run.net.parameters(), lr=0.1)),
    "compiled": lambda run: torch.compile(run.net, backend="eager")(run.x).sum().backward(),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", DROPS)
def test_dropped_model_optimizer_and_handle_are_freed(policy: str, how: str) -> None:
    run = Run(policy)
    tensors = [*run.net.parameters(), *run.net.buffers()]
    refs = [weakref.ref(obj) for obj in (run.net, run.optimizer, run.handle, *run.handle._models, *run.net.modules())]
    old = torch.__version__.startswith("2.9")
    if how != "after an exception in backward" and not (how == "compiled" and old):
        # Torch keeps a parameter alive then, under a plain torch.autocast too; and torch 2.9 the parameters that a
        # compiled Function was given.
        refs += [weakref.ref(tensor) for tensor in tensors]
    DROPS[how](run)
    run.turns.clear()
    del run, tensors
    if how == "compiled":
        torch.compiler.reset()
    gc.collect()
    alive = [type(ref()).__name__ for ref in refs if ref() is not None]
    assert not alive


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_global_is_left_by_a_dropped_model(policy: str) -> None:
    # Models that other tests keep in globals of theirs are not what this is about.
    gc.collect()
    for key in list(audit._due):
        audit._dismiss(key)
    recompute._unscaled.clear()
    border.running.clear()
    border._threads.clear()
    classes = [nn.Module, nn.Linear, torch.optim.Optimizer, torch.optim.SGD, Tensor, torch.autograd.Function, Net]
    attributes = [dict(vars(kind)) for kind in classes]
    before = set(vars(torch)), set(vars(torch.autograd)), set(vars(nn.functional))
    run = Run(policy)
    run.go(30)
    run.net(run.x)
    run.turns.clear()
    del run
    gc.collect()
    # A backward that raised is forgotten by the next forward on its thread.
    other = nn.Linear(1, 1)
    wrapprec.wrap(other, policy=policy)
    other(torch.ones(1, 1))
    del other
    gc.collect()
    assert not border.running and not border._threads and not audit._due
    assert not recompute._unscaled and not recompute._around
    assert torch.autograd._engine_run_backward is _REAL  # type: ignore[attr-defined]
    assert thread.scope is None and not torch.overrides._get_current_function_mode_stack()
    assert [dict(vars(kind)) for kind in classes] == attributes
    assert (set(vars(torch)), set(vars(torch.autograd)), set(vars(nn.functional))) == before


@pytest.mark.parametrize("policy", POLICIES)
def test_model_wrapped_and_unwrapped_many_times_leaves_nothing(policy: str) -> None:
    net, x = Net(), torch.randn(3, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def once() -> None:
        with wrapprec.wrap(net, optimizer, policy, rules=[Rule("norm", "float32")]):
            net(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        once()
    before = living()
    for _ in range(100):
        once()
    more = {kind.__name__: number for kind, number in (living() - before).items()}
    # A few for torch's own caches; anything that each of the hundred leaves would be a hundred.
    assert max(more.values(), default=0) <= 50, more
