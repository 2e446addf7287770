"""Several threads in one wrapped model, and threads that look at it meanwhile."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

CONFIGS: list[Any] = [("16-mixed", 1024), ("16-module", 1024), ("bf16-mixed", None), ("bf16-module", None)]
# Eight roundings of the compute dtype in the norm of a gradient.
TOLERANCE = {"16": 8 * 2**-10, "bf": 8 * 2**-7}


def together(*targets: Callable[[], None]) -> None:
    """Run functions in threads of their own, and raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


class Meeting(nn.Module):
    """Stops inside forward until as many threads are there."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.restart()

    def restart(self) -> None:
        self.__dict__["barrier"] = threading.Barrier(self.number, timeout=20)

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait()
        return x

    def __deepcopy__(self, memo: Any) -> Meeting:
        return Meeting(self.number)


class Meets(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.LSTM(8, 8, batch_first=True) if kind == "lstm" else nn.Linear(8, 8)
        self.meeting = Meeting(2)
        self.second = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.meeting(x)
        out = self.first(x)
        out = self.meeting(out[0] if isinstance(out, tuple) else torch.tanh(out))
        if isinstance(self.first, nn.LSTM):
            out = self.first(out)[0]
        out = self.second(out)
        return self.meeting(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("policy", "scale"), CONFIGS)
@pytest.mark.parametrize("kind", ["linear", "lstm"])
def test_two_threads_inside_one_model_get_true_gradients(policy: str, scale: Any, kind: str) -> None:
    torch.manual_seed(0)
    mine = Meets(kind)
    plain = copy.deepcopy(mine)
    plain.meeting.number = 1
    plain.meeting.restart()
    wrapprec.wrap(mine, policy=policy, loss_scale=scale)
    inputs = [torch.randn(3, 5, 8) for _ in range(2)]
    found: dict[int, Any] = {}
    wanted = [p for p in mine.parameters()]

    def run(index: int) -> None:
        x = inputs[index].clone().requires_grad_()
        loss = mine(x).square().mean()
        found[index] = torch.autograd.grad(loss, [x, *wanted])

    for _ in range(3):
        together(lambda: run(0), lambda: run(1))
        for index in range(2):
            x = inputs[index].clone().requires_grad_()
            true = torch.autograd.grad(plain(x).square().mean(), [x, *plain.parameters()])
            for got, want in zip(found[index], true, strict=True):
                assert (got - want).norm() <= 2 * TOLERANCE[policy[:2]] * want.norm()
    assert all(type(m._parameters) is type(p._parameters) for m, p in zip(mine.modules(), plain.modules(), strict=True))


@pytest.mark.parametrize(("policy", "scale"), CONFIGS)
def test_one_thread_trains_while_another_evaluates(policy: str, scale: Any) -> None:
    torch.manual_seed(0)
    model = Meets("lstm")
    wrapprec.wrap(model, policy=policy, loss_scale=scale)
    x = torch.randn(3, 5, 8)
    results: list[Any] = [None, None]

    def train() -> None:
        results[0] = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))

    def evaluate() -> None:
        with torch.no_grad():
            results[1] = model(x)

    together(train, evaluate)
    assert not results[1].requires_grad and all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in results[0])


@pytest.mark.parametrize(("policy", "scale"), CONFIGS)
def test_other_thread_sees_the_originals_during_forward(policy: str, scale: Any) -> None:
    model = Meets("linear")
    before = dict(model.named_parameters())
    wrapprec.wrap(model, policy=policy, loss_scale=scale)
    seen: dict[str, Any] = {}

    def look() -> None:
        model.meeting.barrier.wait()
        seen["parameters"] = dict(model.named_parameters())
        seen["state"] = model.state_dict()
        seen["weight"] = model.first.weight
        seen["copy"] = copy.deepcopy(model.first)
        model.meeting.barrier.wait()
        model.meeting.barrier.wait()

    together(lambda: model(torch.randn(3, 5, 8)), look)
    assert {k: id(v) for k, v in seen["parameters"].items()} == {k: id(v) for k, v in before.items()}
    assert all(
        seen["state"][k].data_ptr() == v.data_ptr() and seen["state"][k].dtype == torch.float32
        for k, v in before.items()
    )
    assert seen["weight"] is before["first.weight"]
    assert type(seen["copy"].weight) is nn.Parameter and seen["copy"].weight.dtype == torch.float32
    assert type(model.first._parameters) is dict


def test_exception_in_one_thread_does_not_disturb_the_other() -> None:
    class Fails(Meets):
        def forward(self, x: Tensor) -> Tensor:
            self.meeting(x)
            if x.sum() > 0:
                self.meeting(x)
                raise KeyError("planned")
            out = self.first(x)
            self.meeting(x)
            return self.second(out)  # type: ignore[no-any-return]

    model = Fails("linear")
    wrapprec.wrap(model, policy="16-module", loss_scale=8)
    good: list[Tensor] = []

    def fail() -> None:
        with pytest.raises(KeyError, match="planned"):
            model(torch.ones(3, 5, 8))

    together(fail, lambda: good.append(model(-torch.ones(3, 5, 8))))
    good[0].sum().backward()
    assert model.second.weight.grad is not None and type(model.first._parameters) is dict


def test_float32_island_is_the_threads_own() -> None:
    inside, outside = threading.Event(), threading.Event()
    dtypes: list[Any] = []
    low = torch.ones(2, dtype=torch.bfloat16)
    island = wrapprec.float32()

    def one() -> None:
        with island:
            inside.set()
            assert outside.wait(10)
            dtypes.append((low + low).dtype)

    def other() -> None:
        assert inside.wait(10)
        dtypes.append((low + low).dtype)
        with island:
            dtypes.append((low + low).dtype)
        outside.set()

    together(one, other)
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]


class Aside(nn.Module):
    """Keeps an auxiliary loss for each thread, in one dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.aux: dict[int, Tensor] = {}

    def forward(self, x: Tensor, meanwhile: Callable[[], Any] = lambda: None) -> Tensor:
        hidden = torch.tanh(self.body(x))
        self.aux[threading.get_ident()] = hidden.float().square().mean()
        meanwhile()
        out: Tensor = self.head(hidden)
        return out

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        loss = out.square().mean() + self.aux[threading.get_ident()]
        return torch.autograd.grad(loss, list(self.parameters()))


@pytest.mark.parametrize(("policy", "scale"), CONFIGS)
@pytest.mark.parametrize("rescaled", [False, True])
def test_losses_that_threads_keep_side_by_side_on_a_module_are_true(policy: str, scale: Any, rescaled: bool) -> None:
    """Each thread finds the other's, finished or not, when it leaves; they may have opened under different scales."""
    torch.manual_seed(0)
    mine = Aside()
    plain = copy.deepcopy(mine)
    handle = wrapprec.wrap(mine, policy=policy, loss_scale=scale)
    inputs = [torch.randn(6, 8) for _ in range(2)]
    found: dict[int, Any] = {}

    def inner() -> None:
        found[1] = mine.gradients(mine(inputs[1]))

    def meanwhile() -> None:
        if rescaled and scale is not None:
            state = handle.state_dict()
            state["scales"][0]["scale"] /= 2
            handle.load_state_dict(state)
            # The audits that this makes due are for the other forward's backward and two more.
            mine.forward.shared.schedule.left = 0  # type: ignore[attr-defined]
        together(inner)

    def outer() -> None:
        for _ in range(5):
            found[0] = mine.gradients(mine(inputs[0], meanwhile))

    together(outer)
    for index, x in enumerate(inputs):
        for got, want in zip(found[index], plain.gradients(plain(x)), strict=True):
            assert (got - want).norm() <= TOLERANCE[policy[:2]] * want.norm()
