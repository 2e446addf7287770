"""What a forward asks of all modules at once, and the short way that most calls of a module take."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapprec
from wrapprec import Rule
from wrapprec.errors import DtypeMismatchError, ModelChangedError
from wrapprec.standin import forward_of

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.LayerNorm(4))


def by_hand(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net(x).float()


def calls_of(fn: Any) -> Counter[str]:
    """The functions of Python that a call enters, by name."""
    seen: Counter[str] = Counter()

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            seen[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize(("layer", "most"), [(nn.ReLU, 2), (nn.Sequential, 2), (lambda: nn.Linear(4, 4), 2)])
def test_module_that_needs_nothing_enters_two_functions_more_than_its_own(layer: Any, most: int) -> None:
    x = torch.randn(2, 4)

    def count(layers: int, wrapped: bool) -> int:
        net = nn.Sequential(*(layer() for _ in range(layers)))
        if wrapped:
            wrapprec.wrap(net, policy="bf16-mixed")
        net(x)
        return sum(calls_of(lambda: net(x)).values())

    each = {wrapped: (count(12, wrapped) - count(2, wrapped)) / 10 for wrapped in (True, False)}
    # What remains per module besides is comprehensions over all of them, which are one function each.
    assert each[True] - each[False] <= most


def exchange_deep(net: nn.Sequential) -> None:
    net[1][1] = nn.Linear(4, 4)  # type: ignore[index]


def add_to_leaf(net: nn.Sequential) -> None:
    net[0].add_module("adapter", nn.Linear(4, 4))


def remove(net: nn.Sequential) -> None:
    del net[2]


def swap(net: nn.Sequential) -> None:
    net._modules["0"], net._modules["2"] = net._modules["2"], net._modules["0"]


@pytest.mark.parametrize("change", [exchange_deep, add_to_leaf, remove, swap])
def test_changed_submodules_are_taken_up_by_the_next_forward(change: Any) -> None:
    net, x = model(), torch.randn(3, 4)
    handle = wrapprec.wrap(net, policy="bf16-mixed")
    net(x)
    change(net)
    out = net(x)
    assert all(forward_of(module) is not None for module in net.modules())
    assert [p.name for p in handle.plan.placements] == [name for name, _ in net.named_modules()]
    handle.unwrap()
    torch.testing.assert_close(out, by_hand(net, x), rtol=0, atol=0)


@pytest.mark.parametrize("where", ["0", "1.1"])
def test_weights_made_half_behind_the_same_parameter_raise_at_the_next_forward(where: str) -> None:
    net, x = model(), torch.randn(3, 4)
    wrapprec.wrap(net, policy="bf16-mixed")
    net(x)
    param = net.get_submodule(where).weight
    param.data = param.data.half()
    with pytest.raises(ModelChangedError, match=f"Where: '{where}'|Where: \"{where}\""):
        net(x)
    param.requires_grad_(False)
    net(x)  # frozen ones are used as they are
    param.requires_grad_(True)
    with pytest.raises(ModelChangedError):
        net(x)


def test_forward_of_a_class_that_is_exchanged_after_wrap_is_used() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, *, by: float = 1.0) -> Tensor:
            return x * by

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, by=3.0)

    net = Net()
    wrapprec.wrap(net, policy="bf16-mixed")
    assert net(torch.ones(2)).tolist() == [3.0, 3.0]
    Scaled.forward = lambda self, x, *, by: x - by  # type: ignore[method-assign, misc, assignment]
    assert net(torch.ones(2)).tolist() == [-2.0, -2.0]


def test_error_about_dtypes_is_explained_for_the_innermost_module_and_others_come_through() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                raise ValueError("one row")
            return torch.lerp(x.bfloat16(), x, 0.5)

    net = nn.Sequential(nn.Sequential(Mixing()))
    wrapprec.wrap(net, policy="bf16-mixed")
    with pytest.raises(DtypeMismatchError, match=r'"0\.0" \(Mixing\)'):
        net(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"^one row$"):
        net(torch.ones(1, 2))


def test_weight_norm_put_on_after_wrap_and_taken_away_again_is_computed_then_and_only_then() -> None:
    net, x = model(), torch.randn(3, 4)
    handle = wrapprec.wrap(net, policy="bf16-module")
    outs = [net(x)]
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net[0])
    outs.append(net(x))
    nn.utils.remove_weight_norm(net[0])
    outs.append(net(x))
    handle.unwrap()
    # The norm of the rows is divided out and multiplied in: half a last place of bfloat16 in every weight.
    torch.testing.assert_close(outs[1], outs[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(outs[2], outs[0], rtol=0.02, atol=0.02)


def test_contexts_of_autocast_that_are_used_again_restore_what_was_on_however_they_nest() -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    class Looks(nn.Module):
        def __init__(self, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            if self.inner is not None:
                x = self.inner(x)
            elif x.shape[0] == 1:
                raise KeyError("inside")
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return x

    net = Looks(Looks(Looks(Looks())))
    low, wide = (True, torch.bfloat16), (False, torch.get_autocast_dtype("cpu"))
    rules = [Rule("inner", "float32"), Rule("inner.inner", "bf16-mixed"), Rule("inner.inner.inner", "float32")]
    wrapprec.wrap(net, policy="bf16-mixed", rules=rules)
    for _ in range(3):
        seen.clear()
        net(torch.ones(2))
        assert [on for on, _ in seen] == [True, False, True, False, False, True, False, True]
        assert seen[0] == seen[-1] == low
        with pytest.raises(KeyError):
            net(torch.ones(1))
        assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == wide
        with torch.autocast("cpu", torch.bfloat16):
            net(torch.ones(2))
            assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == low
    for other in (copy.deepcopy(net), net):
        seen.clear()
        other(torch.ones(2))
        assert seen[0] == low


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", enabled=False),
        lambda: torch.autocast("xpu", enabled=False),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ],
    ids=["off", "of another device", "on", "without its cache"],
)
@pytest.mark.parametrize("island", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_change_under_an_autocast_around_the_loop_are_cast_anew(
    policy: str, island: bool, around: Any
) -> None:
    # Torch keeps a cast until the outermost context of autocast ends, here after the loop.
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4))), torch.randn(3, 4)
    rules = [Rule("1", "float32"), Rule("1.1", policy.replace("module", "mixed"))] if island else []
    wrapprec.wrap(net, policy=policy, rules=rules)
    net(x)  # contexts made here are used again below
    with warnings.catch_warnings(), around():
        warnings.simplefilter("ignore")
        net(x)
        with torch.no_grad():
            for param in net.parameters():
                param.add_(0.5)
        now = net(x)
    torch.testing.assert_close(now, net(x), rtol=0, atol=0)


def test_a_context_that_is_used_again_leaves_to_forward_what_is_around_it_now() -> None:
    net = nn.Linear(2, 2)
    wrapprec.wrap(net, policy="bf16-mixed", rules=[Rule("", "float32")])
    region = forward_of(net).region
    low, half = torch.bfloat16, torch.float16
    for cache, dtype in [(True, low), (False, half), (True, half), (False, low), (True, low)]:
        with torch.autocast("cpu", dtype, cache_enabled=cache), region.context():
            assert not torch.is_autocast_enabled("cpu")
            assert (torch.is_autocast_cache_enabled(), torch.get_autocast_dtype("cpu")) == (cache, dtype)


@pytest.mark.parametrize("policy", ["bf16-module", "16-module", "bf16-true", "16-true"])
@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(4), lambda: nn.GroupNorm(2, 4), lambda: nn.BatchNorm1d(4)])
def test_norms_that_take_a_mix_bring_a_float32_stream_back_to_low_precision_under_module_casting(
    norm: Any, policy: str
) -> None:
    class Widens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    class Dtype(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.dtype
            return x

    net = nn.Sequential(nn.Linear(4, 4), Widens(), norm(), Dtype())
    wrapprec.wrap(net, policy=policy)
    net(torch.randn(3, 4))
    assert net[3].seen is (torch.float16 if policy.startswith("16") else torch.bfloat16)


def test_threads_in_one_model_share_no_context_of_autocast() -> None:
    meet, failed = threading.Barrier(2), []

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            meet.wait(5)
            return x

    net = nn.Sequential(nn.Linear(4, 4), Waits())
    wrapprec.wrap(net, policy="bf16-mixed")

    def run() -> None:
        for _ in range(5):
            out = net[0](torch.ones(1, 4))
            net(torch.ones(1, 4))
            if torch.is_autocast_enabled("cpu") or out.dtype is not torch.float32:
                failed.append(out.dtype)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)


def test_wrapped_model_pickles_after_its_contexts_were_used() -> None:
    net, x = model(), torch.randn(3, 4)
    wrapprec.wrap(net, policy="bf16-mixed")
    want = net(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), want, rtol=0, atol=0)


def test_module_casting_casts_what_is_not_a_plain_tensor_of_the_dtype() -> None:
    seen: list[Any] = []

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Any, *, more: Any = None) -> Tensor:
            tensors = [*(x if isinstance(x, list) else [x]), *([] if more is None else [more])]
            seen.append([t.dtype for t in tensors if isinstance(t, Tensor)])
            return sum(tensors) * self.weight  # type: ignore[return-value]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Takes()

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            self.inner(x)
            self.inner(wide)
            self.inner([x, wide])
            self.inner(x, more=wide)
            self.inner(nn.Parameter(wide.detach()))
            return self.inner(wide.long(), more=wide)

    net = Net()
    wrapprec.wrap(net, policy="bf16-module")
    net(torch.ones(4))
    low = torch.bfloat16
    assert seen == [[low], [low], [low, low], [low, low], [low], [torch.int64, low]]
