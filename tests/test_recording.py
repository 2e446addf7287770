"""CUDA graphs: what a replay computes once Python is out of the way, on a CPU that records and replays likewise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import FreedMemory, Graph, simulate
from torch import Tensor, nn

from wrapprec import CaptureError, PolicyError, handle_of, unwrap, wrap
from wrapprec.backends.cpu import CpuBackend

POLICIES = ["bf16-mixed", "bf16-module", "32-true"]


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(number: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 6, generator=generator), torch.randint(0, 3, (5,), generator=generator)) for _ in range(number)
    ]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    losses = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# The stand-in for a CUDA graph


def test_graph_runs_again_on_the_same_memory() -> None:
    graph, x = Graph(), torch.ones(3)
    with torch.cuda.graph(graph):
        y = (x * 2).add_(1)
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [11.0] * 3


def test_graph_refuses_a_host_read_and_finds_memory_that_was_freed() -> None:
    graph, x = Graph(), torch.ones(3)
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        x.sum().item()
    with torch.cuda.graph(graph):
        x * 2
    del x
    with pytest.raises(FreedMemory):
        graph.replay()


# Without a loss scale


@pytest.mark.parametrize("policy", POLICIES)
def test_graphed_model_trains_bit_for_bit_as_without_graphs(policy: str) -> None:
    results = []
    for graphed in (False, True):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        wrap(model, optimizer, policy)
        if graphed:
            model = torch.cuda.make_graphed_callables(model, (torch.zeros(5, 6),))
            assert not hasattr(model.forward, "shared")  # a graph, and no Python of ours, from now on
        results.append((train(model, optimizer), [p.detach().clone() for p in model.parameters()]))
    (losses, params), (mine, got) = results
    assert mine == losses
    assert all(torch.equal(a, b) for a, b in zip(params, got, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_whole_step_in_a_graph_trains_bit_for_bit_as_without(policy: str) -> None:
    losses = []
    for recorded in (False, True):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        wrap(model, optimizer, policy)
        x, y = (t.clone() for t in batches(1)[0])

        def step(model: nn.Module = model, optimizer: Any = optimizer, x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        step()  # warming up: it makes the optimizer's state
        graph = Graph()
        if recorded:
            # Recording runs nothing on a GPU.
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            with torch.cuda.graph(graph):
                loss = step()
            model.load_state_dict(state[0])
            for param, values in zip(model.parameters(), state[1]["state"].values(), strict=True):
                for key, value in values.items():
                    optimizer.state[param][key].copy_(value)
        found = []
        for a, b in batches():
            x.copy_(a)
            y.copy_(b)
            if recorded:
                graph.replay()
            else:
                loss = step()
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == losses[0] and losses[0][0] != losses[0][1]


@pytest.mark.parametrize("policy", POLICIES)
def test_graph_recorded_in_frozen_follows_weights_that_change_later(policy: str) -> None:
    model = net()
    handle = wrap(model, None, policy)
    x = torch.randn(5, 6)
    graph = Graph()
    with handle.frozen():
        model(x)  # casts the weights, for as long as the context lasts
        with torch.cuda.graph(graph):
            out = model(x)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(-0.5)
        expected = model(x)
    graph.replay()
    assert torch.equal(out, expected)


# With one


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_forward_under_a_loss_scale_is_refused_in_a_graph_with_the_remedy(policy: str) -> None:
    model = net()
    wrap(model, None, policy)
    with torch.cuda.graph(Graph()), pytest.raises(CaptureError) as caught:
        model(torch.ones(5, 6))
    assert str(caught.value) == (
        "Expected a policy without a loss scale, or none of its forwards with gradients in a graph that is replayed.\n"
        "Received: a forward under a loss scale: replays would keep the scale of this step, and their overflows go"
        " unseen, while cpu records a graph (torch.cpu.graph, make_graphed_callables)\n"
        'Where: "" (the model itself, Sequential)\n'
        "Remedy: use a bf16 policy, of which forward, backward and step can be recorded"
    )
    with torch.cuda.graph(Graph()), torch.no_grad():
        model(torch.ones(5, 6))  # no gradients, no scale


@pytest.mark.parametrize("fused", [True, False])
def test_step_under_a_loss_scale_is_refused_in_a_graph_with_the_remedy(fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    handle = wrap(model, optimizer, "16-mixed", loss_scale=1024.0)
    model(torch.ones(5, 6)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.cuda.graph(Graph()), pytest.raises(CaptureError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "Expected a policy without a loss scale, or its optimizer steps outside of graphs that are replayed.\n"
        "Received: AdamW.step() under a loss scale: replays would not update it, while cpu records a graph"
        " (torch.cpu.graph, make_graphed_callables)\n"
        "Remedy: use a bf16 policy, of which forward, backward and step can be recorded"
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step()
    assert not handle.step_was_skipped and not torch.equal(before[0], model[0].weight)


# Before and after


def test_graphed_model_that_changed_is_refused_in_a_graph() -> None:
    model = net()
    wrap(model, None, "bf16-mixed")
    model[0] = nn.Linear(6, 8)
    with torch.cuda.graph(Graph()), pytest.raises(CaptureError, match="Remedy: call it once before, which warming up"):
        model(torch.ones(5, 6))
    model(torch.ones(5, 6))
    with torch.cuda.graph(Graph()):
        model(torch.ones(5, 6))


def test_wrapping_a_graphed_model_is_refused_by_name_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torch.cuda.make_graphed_callables(model[1], (torch.zeros(2, 3, requires_grad=True),))
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(PolicyError) as caught:
        wrap(model, None, "bf16-mixed")
    assert str(caught.value) == (
        "Expected a model of which no forward replays a graph.\n"
        "Received: a module that torch.cuda.make_graphed_callables was called on, whose graph keeps its precision\n"
        'Where: "1" (Linear)\n'
        "Remedy: wrap first, then make graphs, and change no modules after that"
    )
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("part", [False, True])
def test_unwrap_takes_the_graph_away_with_its_precision(policy: str, part: bool) -> None:
    model, x = net(), batches(1)[0][0]
    before = model(x)
    wrap(model, None, policy)
    if part:
        model[3] = torch.cuda.make_graphed_callables(model[3], (torch.zeros(5, 8, requires_grad=True),))
    else:
        model = torch.cuda.make_graphed_callables(model, (torch.zeros(5, 6),))
    model(x)
    unwrap(model)
    assert handle_of(model) is None
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(x), before)


def test_cpu_and_cuda_without_a_device_record_nothing() -> None:
    from wrapprec.backends.cuda import CudaBackend
    from wrapprec.backends.recording import Recording

    assert Recording.is_recording(CpuBackend()) is False
    assert Recording.is_recording(CudaBackend()) is False


def test_cuda_asks_the_stream_once_cuda_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    from wrapprec.backends.cuda import CudaBackend

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=answer: answer)
        assert CudaBackend().is_recording() is answer
