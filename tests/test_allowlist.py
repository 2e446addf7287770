"""Which modules stay in float32, and why."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from wrapprec.allowlist import is_listed, is_torch_norm, keep_pattern, keeps_float32, scatter_note


class MyNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)


class LinearNorm(nn.Linear):
    pass


class Tuned(nn.LayerNorm):
    pass


class Rewritten(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Router(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.zeros(4).index_add_(0, index, x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm(2), "normalisation"),
        (nn.RMSNorm(2), "normalisation"),
        (nn.GroupNorm(1, 2), "normalisation"),
        (nn.BatchNorm1d(2), "normalisation"),
        (nn.BatchNorm3d(2), "normalisation"),
        (nn.LazyBatchNorm2d(), "normalisation"),
        (nn.SyncBatchNorm(2), "normalisation"),
        (nn.InstanceNorm2d(2), "normalisation"),
        (nn.LocalResponseNorm(2), "normalisation"),
        (nn.CrossMapLRN2d(2), "normalisation"),
        (Tuned(2), "normalisation"),
        (Rewritten(2), "normalisation"),
        (MyNorm(), "normalisation"),
        (nn.Softmax(-1), "softmax"),
        (nn.Softmax2d(), "softmax"),
        (nn.LogSoftmax(-1), "softmax"),
        (nn.Softmin(-1), "softmax"),
        (nn.AdaptiveLogSoftmaxWithLoss(4, 4, [2]), "softmax"),
        (nn.CrossEntropyLoss(), "loss"),
        (nn.TripletMarginWithDistanceLoss(), "loss"),
        (nn.PairwiseDistance(), "distance"),
        (nn.CosineSimilarity(), "distance"),
        (PreNorm(), None),
        (LinearNorm(2, 2), None),
        (nn.Linear(2, 2), None),
        (nn.Softplus(), None),
        (nn.Sequential(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_class_decides_the_reason(module: nn.Module, reason: str | None) -> None:
    assert keeps_float32("anything", module) == reason


@pytest.mark.parametrize(
    ("package", "name", "reason"),
    [
        ("torch_geometric.nn.conv.message_passing", "MessagePassing", "message passing"),
        ("torch_geometric.nn.aggr.base", "Aggregation", "message passing"),
        ("torch_scatter.composite", "Anything", "message passing"),
        ("torch_geometric.nn.dense.linear", "Linear", None),
        ("elsewhere", "MessagePassing", None),
    ],
)
def test_graph_modules_are_known_by_name_through_their_ancestors(package: str, name: str, reason: str | None) -> None:
    base = type(name, (nn.Module,), {"__module__": package})
    assert keeps_float32("conv", type("Conv", (base,), {})()) == reason


def test_hugging_face_names_match_whole_parts_at_the_end() -> None:
    model = nn.Module()
    model._keep_in_fp32_modules = ["wo", "attn.gate"]  # type: ignore[assignment]  # as transformers has it
    model._keep_in_fp32_modules_strict = {"layers.*.router"}  # type: ignore[assignment]  # as transformers has it
    pattern = keep_pattern(model)
    assert pattern is not None
    names = ["wo", "block.0.wo", "block.two", "wo.inner", "x.attn.gate", "gate", "layers.3.router", "router"]
    found = [name for name in names if pattern.search(name)]
    assert found == ["wo", "block.0.wo", "x.attn.gate", "layers.3.router"]


@pytest.mark.parametrize("value", [None, [], set(), ()])
def test_hugging_face_models_that_list_nothing_have_no_pattern(value: object) -> None:
    model = nn.Module()
    model._keep_in_fp32_modules = value  # type: ignore[assignment]  # as transformers has it
    assert keep_pattern(model) is None


def test_listed_tensor_means_the_leaf_that_owns_it() -> None:
    pattern = re.compile(r"(?:^|\.)(?:bias)$")
    assert is_listed("gate", nn.Linear(2, 2), pattern)
    assert not is_listed("gate", nn.Linear(2, 2, bias=False), pattern)
    assert not is_listed("block", nn.Sequential(nn.Linear(2, 2)), pattern)


def test_child_without_weights_makes_no_container_of_a_leaf() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.score = nn.Parameter(torch.ones(2, 2)), nn.Sigmoid()

    assert is_listed("mlp.gate", Gate(), re.compile(r"(?:^|\.)(?:mlp\.gate\.weight)$"))


def test_module_without_weights_that_transforms_to_frequencies_is_kept() -> None:
    class Fourier(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft2(x).real

    assert keeps_float32("mix", Fourier()) == "fourier"
    assert keeps_float32("relu", nn.ReLU()) is None


@pytest.mark.parametrize(
    ("module", "own"),
    [
        (nn.LayerNorm(2), True),
        (Tuned(2), True),
        (Rewritten(2), False),
        (MyNorm(), False),
        (nn.Linear(2, 2), False),
        (weight_norm(nn.LayerNorm(2)), True),
        (nn.LazyBatchNorm2d(), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_torch_norms_are_those_that_keep_torchs_forward(module: nn.Module, own: bool) -> None:
    assert is_torch_norm(module) is own


def test_scatter_in_the_own_forward_is_noted() -> None:
    assert scatter_note(Router()) == (
        "its forward calls index_add_: if sums lose small terms, add a float32 rule for it"
    )
    assert scatter_note(nn.Sequential(Router())) is None
    assert scatter_note(MyNorm()) is None


def test_forward_without_source_gives_no_note() -> None:
    space: dict[str, object] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x): return x.scatter_(0, x, x)", space)
    made = space["Made"]
    assert isinstance(made, type)
    assert scatter_note(made()) is None
