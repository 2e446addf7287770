"""accelerate's hooks: weights that are brought from the host or the disk when a module is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sidebyside import LOW, Results, assert_same, each_module_policy, each_policy, grads, seen
from torch import Tensor, nn

import wrapprec

pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")
accelerate = pytest.importorskip("accelerate")

HOW = ["cpu", "cpu and buffers", "disk", "some on disk"]
each_way = pytest.mark.parametrize("how", HOW)
each_order = pytest.mark.parametrize("wrapped_first", [False, True], ids=["hooks first", "wrapped first"])


class Net(nn.Module):
    """Has buffers, a parameter of its own, a tied weight and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.again = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.full((8,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(x)))
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.last(self.tied(x) * self.scale)


def offload(model: nn.Module, how: str, folder: Path) -> None:
    if how.startswith("cpu"):
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers="buffers" in how)
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), execution_device="cpu")
    else:
        names = ["first", "norm", "again", "tied", "last", "scale"]
        device_map = {name: "disk" if name in ("norm", "again", "last") else "cpu" for name in names}
        accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def make() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(16, 8))
    return model.eval()


@each_policy
@each_order
@each_way
def test_offloaded_model_infers_in_the_compute_dtype(
    policy: str, how: str, wrapped_first: bool, tmp_path: Path
) -> None:
    plain, mine = make(), make()
    found = seen(mine.again)
    if wrapped_first:
        handle = wrapprec.wrap(mine, policy=policy)
        offload(mine, how, tmp_path)
    else:
        offload(mine, how, tmp_path)
        handle = wrapprec.wrap(mine, policy=policy)
    assert mine.last.weight.is_meta
    x = torch.randn(5, 8)
    with torch.no_grad():
        want = plain(x)
        for _ in range(2):
            assert_same({"out": mine(x)}, {"out": want}, policy, slack=2)
        assert_same({"out": mine.last(x)}, {"out": plain.last(x)}, policy)
    with torch.inference_mode():
        assert_same({"out": mine(x)}, {"out": want}, policy, slack=2)
    with handle.frozen():
        assert_same({"out": mine(x)}, {"out": want}, policy, slack=2)
    assert_same({"out": mine(x).detach()}, {"out": want}, policy, slack=2)
    assert set(found) == {LOW[policy[:2]] if "module" in policy else torch.float32} and len(found) == 10
    # Nothing of what was brought stays behind.
    assert mine.last.weight.is_meta and mine.again.bias.is_meta and type(mine.last._parameters) is dict
    handle.unwrap()
    with torch.no_grad():
        assert torch.equal(mine(x), want)
    accelerate.hooks.remove_hook_from_submodules(mine)
    assert torch.equal(mine(x), want)


@each_policy
@each_order
def test_gradients_flow_through_an_offloaded_model(policy: str, wrapped_first: bool, tmp_path: Path) -> None:
    """A prompt is trained through a model that does not fit: the offloaded weights themselves have no gradients."""
    results = []
    for wrapped in (False, True):
        model = make()
        model.requires_grad_(False)
        if wrapped and wrapped_first:
            wrapprec.wrap(model, policy=policy)
        offload(model, "cpu", tmp_path)
        if wrapped and not wrapped_first:
            wrapprec.wrap(model, policy=policy)
        torch.manual_seed(1)
        x = torch.randn(5, 8, requires_grad=True)
        for _ in range(2):
            model(x).square().mean().backward()
        results.append({"x": x.grad})
    assert_same(results[1], results[0], policy, slack=2)


@each_policy
@each_order
def test_dispatched_model_trains(policy: str, wrapped_first: bool) -> None:
    def run(wrapped: bool) -> Results:
        model = make().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrapped and wrapped_first:
            wrapprec.wrap(model, optimizer, policy)
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        if wrapped and not wrapped_first:
            wrapprec.wrap(model, optimizer, policy)
        torch.manual_seed(1)
        for _ in range(3):
            x = torch.randn(16, 8)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return {**grads(model), **{f"new {n}": p.detach().clone() for n, p in model.named_parameters()}}

    assert_same(run(True), run(False), policy, slack=3)


@each_module_policy
@each_order
def test_hooks_can_be_taken_off_a_wrapped_model(policy: str, wrapped_first: bool, tmp_path: Path) -> None:
    plain, mine = make(), make()
    found = seen(mine.last)
    if wrapped_first:
        wrapprec.wrap(mine, policy=policy)
    offload(mine, "cpu", tmp_path)
    if not wrapped_first:
        wrapprec.wrap(mine, policy=policy)
    x = torch.randn(5, 8)
    accelerate.hooks.remove_hook_from_submodules(mine)
    assert_same({"out": mine(x).detach()}, {"out": plain(x).detach()}, policy, slack=2)
    assert found == [LOW[policy[:2]]]
    wrapprec.unwrap(mine)
    assert torch.equal(mine(x), plain(x))
