"""Trains one model class for two steps in every precision."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import wrapprec
from zoo.configs import small, styles
from zoo.inputs import Inputs, Maker

MOST_PARAMETERS = 2_000_000
POLICIES = ("bf16-mixed", "16-mixed", "bf16-module", "16-module")
MODES = ("autocast-bf16", "autocast-f16", *POLICIES)
STEPS = 2
MOST_TRIES = 20

Record = dict[str, Any]


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _tensors(tree: Any, found: list[Tensor]) -> list[Tensor]:
    if isinstance(tree, Tensor):
        if tree.is_floating_point() and tree.requires_grad and all(tree is not other for other in found):
            found.append(tree)
    elif isinstance(tree, dict):
        for value in tree.values():
            _tensors(value, found)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            _tensors(value, found)
    return found


def loss_of(out: Any) -> Tensor:
    """The model's own loss, or a weighted mean of what it gives out.

    The square keeps the gradient of a normalised output from being zero; the bounds are for logits masked with the
    lowest number of their dtype.
    """
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
        return loss.float().reshape(())
    parts = []
    for tensor in _tensors(out, [])[:8]:
        values = tensor.float().reshape(-1).clamp(-100, 100)
        weights = torch.arange(values.numel(), dtype=torch.float32).cos()
        parts.append(((weights + values / 2) * values).mean())
    if not parts:
        raise ValueError("no output requires grad")
    return torch.stack(parts).mean()


class Case:
    """A model class with a config and inputs that train in float32.

    Attributes:
        make: builds the model, the same each time.
        inputs: what its forward gets.
        reference: what the run in float32 gave.
        first: the first loss of an earlier run in float32.
    """

    def __init__(self, make: Callable[[], nn.Module], inputs: Inputs) -> None:
        self.make = make
        self.inputs = inputs
        self.reference: Record = {}
        self.first = 0.0

    def run(self, mode: str) -> Record:
        """Two steps of SGD with clipping; a step that is skipped for an overflow is taken again, as in a real run.

        Returns:
            `losses` before each step, `grads`: the gradients of the first step by name, and `with_grad`, their names
            in the second.
        """
        _seed()
        model = self.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=mode == "autocast-f16")
        handle = wrapprec.wrap(model, optimizer, mode) if mode in POLICIES else None
        dtype = {"autocast-bf16": torch.bfloat16, "autocast-f16": torch.float16}.get(mode)
        losses: list[float] = []
        first: dict[str, Tensor] = {}
        for _ in range(MOST_TRIES):
            _seed()
            optimizer.zero_grad()
            around = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
            with around:
                out = model(**copy.deepcopy(self.inputs))
            loss = loss_of(out)
            if not torch.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss.item()}")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = handle.step_was_skipped if handle is not None else scaler.get_scale() < before
            if skipped:
                continue
            if not losses:
                first = grads
            losses.append(loss.item())
            if len(losses) == STEPS:
                break
        else:
            raise ArithmeticError(f"{MOST_TRIES} tries, {len(losses)} steps: the others overflowed")
        if handle is not None:
            handle.unwrap()
        return {"losses": losses, "grads": first, "with_grad": sorted(grads)}


def find(kind: type[Any]) -> Case:
    """Find a config and inputs with which a class trains in float32, deterministically.

    Raises:
        LookupError: there is none; the text says what the last try of each config raised.
    """
    errors: list[str] = []
    for style in styles():
        try:
            make = _maker(kind, style)
        except (Exception, _TooLarge) as error:
            errors.append(f"{style}: {brief(error)}")
            continue
        found = _try_inputs(make, errors, style)
        if found is not None:
            return found
    raise LookupError(" | ".join(errors))


def _maker(kind: type[Any], style: str) -> Callable[[], nn.Module]:
    config = small(kind.config_class, style)
    with torch.device("meta"), contextlib.suppress(Exception):
        count = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
        if count > MOST_PARAMETERS:
            raise _TooLarge(f"{count} parameters")

    def build() -> Any:
        _seed()
        model = kind(copy.deepcopy(config))
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model.train()

    original = build()
    count = sum(p.numel() for p in original.parameters())
    if not 0 < count <= MOST_PARAMETERS:
        raise _TooLarge(f"{count} parameters")
    try:
        copy.deepcopy(original)
    except Exception:
        return build
    return lambda: copy.deepcopy(original)


class _TooLarge(BaseException):
    """Passes `suppress(Exception)`."""


def _try_inputs(make: Callable[[], nn.Module], errors: list[str], style: str) -> Case | None:
    model = make()
    maker = Maker(model)
    said: list[str] = []
    for inputs in maker.candidates():
        found = None
        for labels in ({}, *maker.labels(inputs)):
            case = Case(make, {**inputs, **labels})
            try:
                case.first = _probe(case)
                found = case
            except Exception as error:
                said.append(f"{'+'.join(case.inputs)}: {brief(error)}")
        if found is not None:
            try:
                found.reference = found.run("fp32")
                return found
            except Exception as error:
                said.append(f"{'+'.join(found.inputs)}: {brief(error)}")
    errors.append(f"{style}: {' / '.join(dict.fromkeys(said[:1] + said[-1:])) or 'no input'}")
    return None


def _probe(case: Case) -> float:
    _seed()
    loss = loss_of(case.make()(**copy.deepcopy(case.inputs)))
    if not torch.isfinite(loss):
        raise ArithmeticError("loss is not finite")
    return loss.item()


_PLACES = re.compile(r"0x[0-9a-f]+|/[\w./-]*/(?=[\w.-]+)")


def brief(error: BaseException) -> str:
    """One line about an error, without addresses and folders."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {_PLACES.sub('', text)}"[:400]


def compare(case: Case, mode: str) -> Record:
    """Run a case in one mode and measure how far it is from float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = case.run(mode)
        except Exception as error:
            return {"error": brief(error)}
    reference = case.reference
    pairs = zip(run["losses"], reference["losses"], strict=True)
    return {
        # Relative above 1, absolute below.
        "loss": max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs),
        "grad": _distance(run["grads"], reference["grads"]),
        "missing": sorted({*reference["grads"], *reference["with_grad"]} - {*run["grads"], *run["with_grad"]})[:3],
        "extra": sorted({*run["grads"], *run["with_grad"]} - {*reference["grads"], *reference["with_grad"]})[:3],
    }


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The relative distance of two gradients, over all parameters."""
    common = ours.keys() & theirs.keys()
    apart = sum(float((ours[k].double() - theirs[k].double()).square().sum()) for k in common)
    size = sum(float(theirs[k].double().square().sum()) for k in common)
    return math.sqrt(apart / max(size, 1e-300))


def verdict(record: Record, mode: str) -> str | None:
    """Say why a class does not pass in a mode, or None.

    It passes when it trains, the same parameters have gradients as in float32, and the losses of both steps differ
    from float32's (relative above 1, absolute below) by no more than 5e-3, 1e-2 under module casting, or three times
    what autocast's differ. Autocast itself passes when it trains.
    """
    run = record["modes"][mode]
    if "error" in run:
        return str(run["error"])
    for what in ("missing", "extra"):
        if run[what]:
            return f"{what} gradients: {', '.join(run[what])}"
    if not math.isfinite(run["grad"]):
        return "gradients that are not finite"
    if mode not in POLICIES:
        return None
    rival = record["modes"]["autocast-bf16" if mode.startswith("bf16") else "autocast-f16"].get("loss", 0.0)
    limit = max(1e-2 if mode.endswith("module") else 5e-3, 3 * rival)
    return None if run["loss"] <= limit else f"the loss differs by {run['loss']:.1e}, autocast's by {rival:.1e}"


def run(kind: type[Any], modes: tuple[str, ...] = MODES) -> Record:
    """Everything about one class."""
    record: Record = {"class": kind.__name__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = find(kind)
        except (Exception, _TooLarge) as error:
            return {**record, "skipped": brief(error)}
    record["parameters"] = sum(p.numel() for p in case.make().parameters())
    record["inputs"] = "+".join(case.inputs)
    # The same loss a second time: the comparison means something.
    record["noise"] = abs(case.first - case.reference["losses"][0])
    record["modes"] = {mode: compare(case, mode) for mode in modes}
    return record


def classes(module: Any) -> Iterator[type[Any]]:
    """The model classes that a module defines, by name."""
    from transformers import PreTrainedModel

    for name, value in sorted(vars(module).items()):
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__:
            if value.config_class is None or name.endswith("PreTrainedModel"):
                continue
            if value.forward is nn.Module.forward:
                continue
            yield value
