"""A fixed sample of the model zoo, by the same criteria as the full run (`tox -e zoo`, docs/compatibility.md)."""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from zoo.case import MODES, POLICIES, Case, loss_of, run, verdict  # they import transformers
from zoo.configs import small

SIZE = 60


def sample() -> list[str]:
    """Classes that trained in the last full run, one of a model type, spread evenly over the alphabet."""
    path = Path(__file__).parent.parent / "docs" / "compatibility" / "zoo.json"
    first = {}
    for record in json.loads(path.read_text()):
        first.setdefault(record["module"].partition(".")[0], f"{record['module']}.{record['class']}")
    names = sorted(first.values())
    return [names[i * len(names) // SIZE] for i in range(SIZE)]


@functools.cache
def result(name: str) -> dict[str, Any]:
    module, _, kind = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = getattr(importlib.import_module(f"transformers.models.{module}"), kind)
        except (ImportError, AttributeError):
            return {"skipped": f"this version of transformers has no {kind}"}
        return run(found)


def trained() -> list[dict[str, Any]]:
    return [record for record in map(result, sample()) if "modes" in record]


@pytest.mark.parametrize("name", sample())
def test_model_trains_where_autocast_does(name: str) -> None:
    record = result(name)
    if "modes" not in record:
        pytest.skip(record["skipped"])
    for policy, rival in (("bf16-mixed", "autocast-bf16"), ("16-mixed", "autocast-f16")):
        why = verdict(record, policy)
        assert why is None or verdict(record, rival) is not None, f"{policy}: {why}"


def test_sample_is_large_and_trains() -> None:
    assert len(set(sample())) == SIZE
    # With another version of transformers than the one of the full run, some may be missing.
    assert len(trained()) >= 0.9 * SIZE


@pytest.mark.parametrize(("policy", "rival"), [("bf16-mixed", "autocast-bf16"), ("16-mixed", "autocast-f16")])
def test_at_least_as_many_pass_as_under_autocast(policy: str, rival: str) -> None:
    mine, theirs = (sum(verdict(record, mode) is None for record in trained()) for mode in (policy, rival))
    assert mine >= theirs


def test_97_percent_pass_in_bf16_module() -> None:
    failed = {r["class"]: why for r in trained() if (why := verdict(r, "bf16-module")) is not None}
    assert len(failed) <= 0.03 * len(trained()), failed


@pytest.mark.parametrize(("policy", "rival"), [("bf16-mixed", "autocast-bf16"), ("16-mixed", "autocast-f16")])
def test_gradients_are_not_further_off_than_three_times_autocasts(policy: str, rival: str) -> None:
    """A loss of two steps is blind to a wrong gradient of one parameter in a hundred; their distance is not."""
    for record in trained():
        modes = record["modes"]
        if verdict(record, policy) is None and verdict(record, rival) is None:
            assert modes[policy]["grad"] <= max(0.1, 3 * modes[rival]["grad"]), record["class"]


def test_full_run_meets_the_criteria() -> None:
    """Of the committed table, which `tox -e zoo` writes anew."""
    records = json.loads((Path(__file__).parent.parent / "docs" / "compatibility" / "zoo.json").read_text())
    passed = {mode: sum(mode not in record.get("failed", {}) for record in records) for mode in MODES}
    assert len(records) > 1000
    assert passed["bf16-mixed"] >= passed["autocast-bf16"] and passed["16-mixed"] >= passed["autocast-f16"]
    assert passed["bf16-module"] >= 0.97 * len(records)
    assert all(all(record.get("failed", {"": "a"}).values()) for record in records), "each failure has a reason"


class _Record(dict[str, Any]):
    """A record in which all went well, but for what is given."""

    def __init__(self, mode: str, **other: Any) -> None:
        good = {"loss": 1e-3, "grad": 1e-2, "missing": [], "extra": []}
        super().__init__(modes={m: dict(good) for m in MODES})
        self["modes"][mode] = {**good, **other}


@pytest.mark.parametrize("mode", MODES)
def test_verdict_tells_each_way_to_fail(mode: str) -> None:
    assert verdict(_Record(mode), mode) is None
    assert "boom" in str(verdict(_Record(mode, error="RuntimeError: boom"), mode))
    assert "missing gradients: a" in str(verdict(_Record(mode, missing=["a"]), mode))
    assert "extra gradients: b" in str(verdict(_Record(mode, extra=["b"]), mode))
    assert "not finite" in str(verdict(_Record(mode, grad=float("nan")), mode))
    limit = 1e-2 if mode.endswith("module") else 5e-3
    assert verdict(_Record(mode, loss=limit), mode) is None
    assert (verdict(_Record(mode, loss=1.1 * limit), mode) is None) == (mode not in POLICIES)


def test_loss_may_differ_three_times_as_much_as_autocasts() -> None:
    record = _Record("bf16-mixed", loss=0.03)
    assert verdict(record, "bf16-mixed") is not None
    record["modes"]["autocast-bf16"]["loss"] = 0.01
    assert verdict(record, "bf16-mixed") is None


def test_wrong_gradients_show_as_a_distance() -> None:
    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2 if torch.is_autocast_enabled("cpu") or wrong[0] else grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return {"out": Doubles.apply(self.fc(x))}

    wrong = [False]
    case = Case(Model, {"x": torch.ones(2, 3)})
    case.reference = case.run("fp32")
    from zoo.case import compare

    assert compare(case, "fp32")["grad"] == 0
    wrong[0] = True
    assert compare(case, "fp32")["grad"] == pytest.approx(1.0)


def test_small_config_is_small_all_the_way_down_and_the_same_each_time() -> None:
    from transformers import CLIPConfig

    config = small(CLIPConfig, "small")
    assert config.text_config.num_hidden_layers == config.vision_config.num_hidden_layers == 2
    assert config.text_config.hidden_size == 64 and config.vision_config.image_size == 64
    assert config.to_dict() == small(CLIPConfig, "small").to_dict()


def test_loss_is_the_models_own_or_made_of_its_outputs() -> None:
    x = torch.ones(4, requires_grad=True)
    own = type("Output", (dict,), {"loss": (x * 2).sum()})()
    assert loss_of(own).item() == 8
    made = loss_of({"a": x * 3, "b": [x * 2, torch.arange(3)]})
    made.backward()
    assert x.grad is not None and x.grad.abs().min() > 0
