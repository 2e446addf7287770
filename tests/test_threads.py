"""Several threads in one wrapped model, and threads that look at it meanwhile."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wrapprec
from wrapprec import LossScale, ScaleLeakError

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
SCALED = ["16-mixed", "16-module"]
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


# Many threads, many times: a switch between threads wherever Python allows one shows a race that a quiet run hides.


@pytest.fixture
def _hurried() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def close(mine: Tensor, true: Tensor, policy: str, times: float = 1) -> bool:
    return bool((mine - true).norm() <= times * TOLERANCE[policy[:2]] * true.norm())


class Recurrent(nn.Module):
    """An RNN, which keeps a list of its weights as an attribute, and a checkpoint around a part."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0]
        return self.head(checkpoint(self.part, out, use_reentrant=False))  # type: ignore[no-any-return]


def small(kind: str) -> nn.Module:
    if kind == "recurrent":
        return Recurrent()
    # Two weights, and more threads than those.
    return nn.Linear(8, 4) if kind == "one" else nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["one", "several", "recurrent"])
@pytest.mark.usefixtures("_hurried")
def test_gradients_of_many_threads_accumulate_as_in_float32(policy: str, kind: str) -> None:
    number, times = 5, 6
    mine = small(kind)
    plain = copy.deepcopy(mine)
    wrapprec.wrap(mine, policy=policy)
    xs = torch.randn(number, times, 3, 5, 8)
    start = threading.Barrier(number, timeout=20)

    def train(index: int) -> None:
        for x in xs[index]:
            start.wait()
            loss = mine(x).square().mean()
            start.wait()
            loss.backward()

    together(*(lambda i=i: train(i) for i in range(number)))  # type: ignore[misc]
    for x in xs.flatten(0, 1):
        plain(x).square().mean().backward()
    for got, true in zip(mine.parameters(), plain.parameters(), strict=True):
        # The roundings of thirty gradients average out; a lost or doubled one would be a thirtieth, 0.03.
        assert close(got.grad, true.grad, policy, times=0.5)
    assert all(type(module._parameters) is dict for module in mine.modules())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("_hurried")
def test_threads_that_train_evaluate_look_and_raise_do_not_disturb_each_other(policy: str) -> None:
    class Fails(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if x.shape[0] == 1:
                raise KeyError("planned")
            return out  # type: ignore[no-any-return]

    mine = Fails(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    plain = copy.deepcopy(mine)
    handle = wrapprec.wrap(mine, policy=policy)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    x = torch.randn(3, 8)
    true_out = plain(x)
    true = torch.autograd.grad(true_out.square().mean(), list(plain.parameters()))
    params = list(mine.parameters())
    start = threading.Barrier(6, timeout=20)

    def train() -> None:
        grads = torch.autograd.grad(mine(x).square().mean(), params)
        assert all(close(g, t, policy) for g, t in zip(grads, true, strict=True))

    def evaluate() -> None:
        with torch.no_grad():
            out = mine(x)
        assert not out.requires_grad and close(out, true_out.detach(), policy)

    def freeze() -> None:
        with handle.frozen():
            assert close(mine(x), true_out.detach(), policy)

    def look() -> None:
        state = mine.state_dict()
        assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
        assert [id(p) for p in mine.parameters()] == [id(p) for p in params]
        assert mine[0].weight is params[0]

    def fail() -> None:
        with pytest.raises(KeyError, match="planned"):
            mine(x[:1])

    def often(what: Callable[[], None]) -> None:
        for _ in range(15):
            start.wait()
            what()

    together(*(lambda what=w: often(what) for w in (train, train, evaluate, freeze, look, fail)))  # type: ignore[misc]
    assert all(type(module._parameters) is dict for module in mine.modules())


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_on_another_thread_than_forward_is_true(policy: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.head = nn.Linear(8, 4)
            self.reentrant = reentrant

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.part, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]

    for reentrant in (False, True):
        mine = Checkpointed(reentrant)
        plain = copy.deepcopy(mine)
        wrapprec.wrap(mine, policy=policy)
        x = torch.randn(3, 8, requires_grad=True)
        losses: list[Tensor] = []
        together(lambda m=mine, x=x, to=losses: to.append(m(x).square().mean()))  # type: ignore[misc]
        together(losses[0].backward)
        got, x.grad = x.grad, None
        plain(x).square().mean().backward()
        assert got is not None and x.grad is not None and close(got, x.grad, policy)
        for one, true in zip(mine.parameters(), plain.parameters(), strict=True):
            assert close(one.grad, true.grad, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_different_models_on_different_threads_are_independent(policy: str) -> None:
    others = dict(zip(POLICIES, reversed(POLICIES), strict=True))
    start = threading.Barrier(2, timeout=20)
    models = [small("several") for _ in range(2)]
    plains = [copy.deepcopy(model) for model in models]
    xs = torch.randn(2, 3, 8)
    for model, name in zip(models, (policy, others[policy]), strict=True):
        wrapprec.wrap(model, policy=name)

    def train(index: int) -> None:
        for _ in range(5):
            start.wait()
            models[index].zero_grad()
            models[index](xs[index]).square().mean().backward()

    together(lambda: train(0), lambda: train(1))
    for model, plain, x in zip(models, plains, xs, strict=True):
        plain(x).square().mean().backward()
        for got, true in zip(model.parameters(), plain.parameters(), strict=True):
            assert close(got.grad, true.grad, "bf16")


@pytest.mark.parametrize("policy", SCALED)
def test_overflow_on_one_thread_is_not_forgotten_by_anothers_backward(policy: str) -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=2.0**10))
    recorded, done = threading.Event(), threading.Event()

    def wait(grad: Tensor) -> None:
        # Between the record of the overflow and its accumulation.
        if threading.current_thread().name == "overflows" and not recorded.is_set():
            recorded.set()
            assert done.wait(20)

    for param in model.parameters():
        param.register_hook(wait)

    def overflow() -> None:
        threading.current_thread().name = "overflows"
        (model(torch.randn(3, 8)) * 1e9).sum().backward()

    def train() -> None:
        assert recorded.wait(20)
        model(torch.randn(3, 8)).square().mean().backward()
        done.set()

    together(overflow, train)
    for param in model.parameters():
        param.grad = param.grad.nan_to_num().clamp(-1, 1)  # type: ignore[union-attr]
    before = model.weight.detach().clone()
    optimizer.step()
    assert handle.step_was_skipped and torch.equal(model.weight, before) and handle.scale == 2.0**9


@pytest.mark.parametrize("policy", SCALED)
def test_scale_that_changes_between_a_threads_forward_and_backward_changes_no_gradient(policy: str) -> None:
    model = small("several")
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapprec.wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=2.0**10))
    x = torch.randn(3, 8)
    between, changed = threading.Event(), threading.Event()
    grads: list[Any] = []

    def train() -> None:
        loss = model(x).square().mean()
        between.set()
        assert changed.wait(20)
        grads.extend(torch.autograd.grad(loss, list(model.parameters())))

    def overflow() -> None:
        assert between.wait(20)
        (model(x) * 1e9).sum().backward()
        optimizer.step()
        changed.set()

    together(train, overflow)
    assert handle.scale == 2.0**9
    true = torch.autograd.grad(plain(x).square().mean(), list(plain.parameters()))
    assert all(close(g, t, policy) for g, t in zip(grads, true, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("_hurried")
def test_first_forwards_of_a_copy_on_several_threads_are_true(policy: str) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    plain = copy.deepcopy(model)
    wrapprec.wrap(model, policy=policy)
    x = torch.randn(3, 8)
    true = torch.autograd.grad(plain(x).square().mean(), list(plain.parameters()))
    for _ in range(4):
        # A copy finds its modules, and groups its weights, when it is first called.
        twin = copy.deepcopy(model)
        start = threading.Barrier(4, timeout=20)
        params = list(twin.parameters())
        grads: list[Any] = []

        def train(twin: nn.Module = twin, start: Any = start, params: Any = params, grads: Any = grads) -> None:
            start.wait()
            grads.append(torch.autograd.grad(twin(x).square().mean(), params))

        together(*[train] * 4)
        for found in grads:
            assert all(close(g, t, policy) for g, t in zip(found, true, strict=True))


@pytest.mark.parametrize("policy", ["bf16-module", "16-module"])
def test_frozen_contexts_that_end_in_another_order_leave_no_frozen_weights(policy: str) -> None:
    model = nn.Linear(8, 4)
    handle = wrapprec.wrap(model, policy=policy)
    x = torch.randn(3, 8)
    one_in, other_in, one_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with handle.frozen():
            model(x)
            one_in.set()
            assert other_in.wait(20)
        one_out.set()

    def second() -> None:
        assert one_in.wait(20)
        with handle.frozen():
            other_in.set()
            assert one_out.wait(20)

    together(first, second)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
        assert model(x).abs().max() == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_parts_run_on_threads_of_forwards_own_are_true_or_refused(policy: str) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: dict[int, Tensor] = {}
            together(*(lambda i=i: found.update({i: self.branches[i](x)}) for i in range(2)))  # type: ignore[misc]
            return self.head(found[0] + found[1])  # type: ignore[no-any-return]

    mine = Branches()
    plain = copy.deepcopy(mine)
    wrapprec.wrap(mine, policy=policy)
    x = torch.randn(3, 8)
    loss = mine(x).square().mean()
    if policy in SCALED:
        # The thread does not say whose part it computes: its gradients would be scaled twice.
        with pytest.raises(ScaleLeakError, match="left one forward and was used in another"):
            loss.backward()
        return
    loss.backward()
    plain(x).square().mean().backward()
    for got, true in zip(mine.parameters(), plain.parameters(), strict=True):
        assert close(got.grad, true.grad, policy)


@pytest.mark.parametrize("policy", SCALED)
def test_tensors_made_on_another_thread_and_given_in_a_list_stay_as_they_are(policy: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, parts: list[Tensor]) -> Tensor:
            return self.layer(sum(parts))  # type: ignore[no-any-return]

    model = Sum()
    plain = copy.deepcopy(model)
    wrapprec.wrap(model, policy=policy)
    source = torch.randn(3, 8, requires_grad=True)
    losses: list[Tensor] = []
    grads = []
    for used in (model, plain):
        # Far more nodes than a new thread has made: autograd numbers them thread by thread.
        parts = [source * 2 for _ in range(50)][-2:]
        kept = list(parts)
        together(lambda m=used, p=parts: losses.append(m(p).square().mean()))  # type: ignore[misc]
        assert all(a is b for a, b in zip(parts, kept, strict=True))
        grads.append(torch.autograd.grad(losses.pop() + parts[0].square().mean(), source)[0])
    assert close(grads[0], grads[1], policy)
