"""A tensor that crosses the scale border by another way than inputs and outputs gives true gradients or an error."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

import wrapprec
from wrapprec import ScaleLeakError

pytestmark = pytest.mark.filterwarnings("ignore:float16 on a CPU")

SCALE = 1024
# Eight roundings to float16 in the norm of a gradient; what leaks is wrong by the factor 1024.
TOLERANCE = {"16": 8 * 2**-10, "32": 1e-5}
each_policy = pytest.mark.parametrize("policy", ["16-mixed", "16-module", "32-true"])

Gradients = dict[str, "Tensor | None"]
MENDED, FOUND = "mended", "found"


def grads(model: nn.Module) -> Gradients:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def outcome(make: Callable[[], nn.Module], run: Callable[[Any], Gradients], policy: str) -> str:
    """`mended` when every gradient is the plain model's, `found` when an error names the leak; else it fails."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    mine = make()
    torch.manual_seed(1)
    want = run(plain)
    assert any(g is not None and g.abs().sum() > 0 for g in want.values()), "the reference shows nothing"
    wrapprec.wrap(mine, policy=policy, loss_scale=SCALE)
    torch.manual_seed(1)
    try:
        got = run(mine)
    except ScaleLeakError as error:
        text = str(error)
        assert "shape" in text or "parameter" in text or "gradient that reached" in text or "left one forward" in text
        assert "Remedy" in text
        return FOUND
    assert got.keys() == want.keys()
    for name, true in want.items():
        mine_grad = got[name]
        if true is None or mine_grad is None:
            assert mine_grad is None and true is None, name
            continue
        assert mine_grad.dtype == true.dtype
        off = (mine_grad - true).norm() / true.norm().clamp(min=1e-30)
        assert off <= 3 * TOLERANCE[policy[:2]], f"{name}: relative error {off:.2e}"
    return MENDED


def batch() -> Tensor:
    return torch.randn(6, 8)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)


# Outputs


@dataclasses.dataclass
class Answer:
    logits: Tensor
    extra: dict[str, Any]


class Opaque:
    __slots__ = ("found",)

    def __init__(self, found: Tensor) -> None:
        self.found = found


@each_policy
def test_distribution_that_is_returned_is_mended(policy: str) -> None:
    class Makes(Base):
        def forward(self, x: Tensor) -> Normal:
            hidden = torch.tanh(self.body(x))
            return Normal(self.head(hidden), F.softplus(self.head(hidden * 2)) + 0.1)

    def run(model: Any) -> Gradients:
        model(batch()).log_prob(torch.zeros(6, 4)).mean().backward()
        return grads(model)

    assert outcome(Makes, run, policy) == MENDED


@each_policy
def test_objects_dataclasses_and_dicts_that_are_returned_are_mended(policy: str) -> None:
    class Makes(Base):
        def forward(self, x: Tensor) -> Answer:
            hidden = torch.tanh(self.body(x))
            return Answer(self.head(hidden), {"deep": [Opaque(hidden)], "set": (hidden.mean(),)})

    def run(model: Any) -> Gradients:
        answer = model(batch())
        assert type(answer) is Answer
        loss = answer.logits.float().square().mean() + answer.extra["deep"][0].found.float().mean()
        (loss + answer.extra["set"][0]).backward()
        return grads(model)

    assert outcome(Makes, run, policy) == MENDED


@each_policy
def test_tensor_in_a_generator_that_is_returned_is_true_or_found(policy: str) -> None:
    class Makes(Base):
        def forward(self, x: Tensor) -> Iterator[Tensor]:
            hidden = self.head(self.body(x))
            return iter([hidden])

    def run(model: Any) -> Gradients:
        next(model(batch())).square().mean().backward()
        return grads(model)

    assert outcome(Makes, run, policy) == FOUND


# Things passed in and filled


@each_policy
@pytest.mark.parametrize("kind", [list, dict, Opaque, Answer])
def test_containers_and_objects_that_are_passed_in_and_filled_are_mended(policy: str, kind: Any) -> None:
    class Fills(Base):
        def forward(self, x: Tensor, cache: Any) -> Tensor:
            hidden = torch.tanh(self.body(x))
            if isinstance(cache, list):
                cache.append(hidden)
            elif isinstance(cache, dict):
                cache["x"] = hidden
            elif isinstance(cache, Opaque):
                cache.found = hidden
            else:
                cache.logits = hidden
            out: Tensor = self.head(hidden)
            return out

    def run(model: Any) -> Gradients:
        start = torch.zeros(2)
        cache: Any = Opaque(start) if kind is Opaque else Answer(start, {}) if kind is Answer else kind()
        out = model(batch(), cache)
        kept = {
            list: lambda: cache[0],
            dict: lambda: cache["x"],
            Opaque: lambda: cache.found,
            Answer: lambda: cache.logits,
        }
        (out.square().mean() + kept[kind]().float().square().mean()).backward()
        return grads(model)

    assert outcome(Fills, run, policy) == MENDED


@each_policy
def test_list_of_inputs_that_is_filled_keeps_what_it_had_and_gets_the_new(policy: str) -> None:
    """The list is copied on the way in, because the tensor in it is replaced."""

    class Fills(Base):
        def forward(self, cache: list[Tensor]) -> Tensor:
            cache.append(torch.tanh(self.body(cache[0])))
            out: Tensor = self.head(cache[-1])
            return out

    def run(model: Any) -> Gradients:
        x = batch().requires_grad_()
        cache = [x]
        out = model(cache)
        assert cache[0] is x and len(cache) == 2
        (out.square().mean() + cache[1].float().square().mean()).backward()
        return {**grads(model), "x": x.grad}

    assert outcome(Fills, run, policy) == MENDED


@each_policy
def test_input_that_requires_grad_inside_an_object_is_true(policy: str) -> None:
    class Reads(Base):
        def forward(self, given: Opaque) -> Tensor:
            out: Tensor = self.head(self.body(given.found))
            return out

    def run(model: Any) -> Gradients:
        x = batch().requires_grad_()
        model(Opaque(x)).square().mean().backward()
        return {**grads(model), "x": x.grad}

    assert outcome(Reads, run, policy) == MENDED


# Module attributes


class Expert(nn.Module):
    """Leaves a loss behind, as a mixture of experts does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.where = where
        self.aux_loss: Any = None
        self.register_buffer("aux_buffer", None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.layer(x))
        aux = out.float().square().mean()
        if self.where == "attribute":
            self.aux_loss = aux
        elif self.where == "list":
            self.aux_loss = [aux, {"again": aux}]
        elif self.where == "tuple":
            self.aux_loss = (aux, 3)
        elif self.where == "left":
            self.aux_loss = wrapprec.leave(aux)
        elif self.where == "object":
            self.aux_loss = Opaque(aux)
        else:
            self.aux_buffer = aux
        return out

    def found(self) -> Any:
        value = self.aux_buffer if self.where == "buffer" else self.aux_loss
        return value[0] if isinstance(value, (list, tuple)) else value.found if isinstance(value, Opaque) else value


class Mixture(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(where) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(sum(expert(x) for expert in self.experts))
        return out


@each_policy
@pytest.mark.parametrize("where", ["attribute", "list", "tuple", "buffer", "left", "object"])
@pytest.mark.parametrize("alone", [True, False])
def test_loss_left_on_a_module_is_true(policy: str, where: str, alone: bool) -> None:
    def run(model: Any) -> Gradients:
        for _ in range(2):
            out = model(batch())
            loss = sum(expert.found() for expert in model.experts)
            (loss if alone else loss + out.square().mean()).backward()
        return grads(model)

    assert outcome(lambda: Mixture(where), run, policy) == MENDED


@each_policy
def test_state_kept_on_a_module_from_forward_to_forward_is_true(policy: str) -> None:
    """Transformer-XL's memory, without detach."""

    class Remembers(Base):
        memory: Any = None

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x if self.memory is None else x + self.memory))
            self.memory = hidden
            out: Tensor = self.head(hidden)
            return out

    def run(model: Any) -> Gradients:
        x = batch()
        (model(x).square().mean() + model(x).abs().mean() + model(x).mean()).backward()
        return grads(model)

    assert outcome(Remembers, run, policy) == MENDED


@each_policy
def test_state_kept_detached_is_true(policy: str) -> None:
    class Remembers(Base):
        memory: Any = None

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x if self.memory is None else x + self.memory))
            self.memory = hidden.detach()
            out: Tensor = self.head(hidden)
            return out

    def run(model: Any) -> Gradients:
        for _ in range(3):
            model(batch()).square().mean().backward()
        return grads(model)

    assert outcome(Remembers, run, policy) == MENDED


# Hooks


@each_policy
def test_activation_collected_by_a_hook_is_found(policy: str) -> None:
    def run(model: Any) -> Gradients:
        collected: list[Tensor] = []
        model[0].register_forward_hook(lambda module, args, out: collected.append(out))
        out = model(batch())
        (out.square().mean() + collected[0].float().square().mean()).backward()
        return grads(model)

    assert outcome(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), run, policy) == FOUND


@each_policy
@pytest.mark.parametrize("when", ["in the hook", "afterwards", "both", "twice"])
def test_leave_mends_an_activation_that_a_hook_collects(policy: str, when: str) -> None:
    def run(model: Any) -> Gradients:
        collected: list[Tensor] = []

        def collect(module: nn.Module, args: Any, out: Tensor) -> None:
            if when == "afterwards":
                collected.append(out)
            else:
                left = wrapprec.leave(out)
                collected.append(wrapprec.leave(left) if when == "twice" else left)

        model[0].register_forward_hook(collect)
        out = model(batch())
        kept = collected[0] if when == "in the hook" else wrapprec.leave(collected[0])
        (out.square().mean() + kept.float().square().mean()).backward()
        return grads(model)

    assert outcome(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), run, policy) == MENDED


@each_policy
@pytest.mark.parametrize("when", ["inside", "afterwards"])
def test_leave_mends_what_leaves_a_model_called_inside_another(policy: str, when: str) -> None:
    class Outer(Base):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = [inner]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.inner[0](self.body(x)))
            return out

    torch.manual_seed(0)
    results = []
    plain = Outer(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    mine = copy.deepcopy(plain)
    mine.inner = [copy.deepcopy(plain.inner[0])]
    wrapprec.wrap([mine, mine.inner[0]], policy=policy, loss_scale=32)
    for model in (plain, mine):
        collected: list[Tensor] = []
        keep = wrapprec.leave if when == "inside" else lambda t: t
        model.inner[0][0].register_forward_hook(lambda m, a, out, keep=keep, to=collected: to.append(keep(out)))
        torch.manual_seed(1)
        out = model(batch())
        (out.square().mean() + wrapprec.leave(collected[0]).float().square().mean()).backward()
        results.append({**grads(model), **{f"inner.{k}": v for k, v in grads(model.inner[0]).items()}})
    for name, true in results[0].items():
        got = results[1][name]
        assert got is not None and true is not None
        assert (got - true).norm() <= 3 * TOLERANCE[policy[:2]] * true.norm(), name


def test_leave_refuses_a_tensor_that_is_partly_outside() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    wrapprec.wrap(model, policy="16-mixed", loss_scale=SCALE)
    collected: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, out: collected.append(out))
    out = model(batch())
    with pytest.raises(ScaleLeakError, match="where it is collected"):
        wrapprec.leave(out + collected[0])
    assert wrapprec.leave(out) is out


@each_policy
def test_gradient_asked_for_an_inner_activation_is_found(policy: str) -> None:
    """Grad-CAM: it would be the scaled one."""

    def run(model: Any) -> Gradients:
        collected: list[Tensor] = []
        model[0].register_forward_hook(lambda module, args, out: collected.append(out))
        out = model(batch())
        (slope,) = torch.autograd.grad(out.square().mean(), collected[0])
        return {"slope": slope.float()}

    assert outcome(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), run, policy) == FOUND


@each_policy
def test_gradient_by_a_name_that_was_imported_earlier_is_audited_too(policy: str) -> None:
    from torch.autograd import grad

    class Closes(Base):
        def forward(self, x: Tensor) -> Tensor:
            KEPT.append(self.body(x))
            out: Tensor = self.head(KEPT[-1])
            return out

    def run(model: Any) -> Gradients:
        KEPT.clear()
        out = model(batch())
        found = grad(out.square().mean() + KEPT[0].float().square().mean(), list(model.parameters()))
        return dict(enumerate(found))  # type: ignore[arg-type]  # numbers do as names

    assert outcome(Closes, run, policy) == FOUND


KEPT: list[Tensor] = []


# Things used inside that no one lent


@each_policy
def test_unregistered_module_in_a_plain_list_is_true_or_found(policy: str) -> None:
    class Hides(Base):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Linear(8, 8)]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.hidden[0](self.body(x).float()))
            return out

    def run(model: Any) -> Gradients:
        model(batch()).square().mean().backward()
        return {**grads(model), **{f"h.{k}": v for k, v in grads(model.hidden[0]).items()}}

    try:
        assert outcome(Hides, run, policy) == FOUND
    except wrapprec.DtypeMismatchError:
        assert policy == "16-module"


@each_policy
def test_loose_tensor_that_requires_grad_is_true(policy: str) -> None:
    class Loose(Base):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = torch.ones(4, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x)) * self.temperature
            return out

    def run(model: Any) -> Gradients:
        model(batch()).square().mean().backward()
        return {**grads(model), "temperature": model.temperature.grad}

    assert outcome(Loose, run, policy) == MENDED


@each_policy
def test_module_added_after_wrap_is_taken_up(policy: str) -> None:
    def run(model: Any) -> Gradients:
        torch.manual_seed(5)
        model.append(nn.Linear(4, 4))
        model[0].register_parameter("late", nn.Parameter(torch.ones(1)))
        model(batch()).square().mean().backward()
        return grads(model)

    assert outcome(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), run, policy) == MENDED


@each_policy
def test_module_added_inside_forward_is_true_or_found(policy: str) -> None:
    class Grows(Base):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "late"):
                torch.manual_seed(5)
                self.late = nn.Linear(8, 8)
            out: Tensor = self.head(self.late(self.body(x).float()))
            return out

    def run(model: Any) -> Gradients:
        model(batch()).square().mean().backward()
        return grads(model)

    try:
        assert outcome(Grows, run, policy) == FOUND
    except wrapprec.DtypeMismatchError:
        assert policy == "16-module"


# Backward in odd places


@each_policy
def test_backward_inside_forward_is_an_error(policy: str) -> None:
    class Backs(Base):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x))
            out.float().square().mean().backward()
            return out.detach()

    def run(model: Any) -> Gradients:
        model(batch())
        return grads(model)

    assert outcome(Backs, run, policy) == FOUND


@each_policy
def test_requires_grad_set_on_an_input_inside_forward_is_true_or_found(policy: str) -> None:
    class Forces(Base):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x.requires_grad_()
            energy = self.head(torch.tanh(self.body(x))).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return energy, force

    def run(model: Any) -> Gradients:
        energy, force = model(batch())
        (energy + force.square().sum()).backward()
        return grads(model)

    assert outcome(Forces, run, policy) in (MENDED, FOUND)


@each_policy
def test_optimizer_stepping_inside_backward_uses_true_gradients(policy: str) -> None:
    def train(model: nn.Module, wrapped: bool) -> Gradients:
        seen: Gradients = {}
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
        if wrapped:
            wrapprec.wrap(model, list(optimizers.values()), policy, loss_scale=SCALE)

        def act(p: Tensor, name: str) -> None:
            assert p.grad is not None
            seen[name] = p.grad.clone()
            optimizers[p].step()
            optimizers[p].zero_grad()

        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name: act(p, name))
        for _ in range(3):
            model(batch()).square().mean().backward()
        return {**seen, **{f"stepped.{n}": p.detach() for n, p in model.named_parameters()}}

    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))
        torch.manual_seed(1)
        results.append(train(model, wrapped))
    for name, true in results[0].items():
        got = results[1][name]
        assert got is not None and true is not None
        assert (got - true).norm() <= 3 * TOLERANCE[policy[:2]] * true.norm(), name


@each_policy
@pytest.mark.parametrize("on_module", [True, False])
def test_tensor_of_one_forward_used_unseen_in_another_is_true_on_a_module_and_found_elsewhere(
    policy: str, on_module: bool
) -> None:
    elsewhere: list[Any] = [None]

    class Reads(Base):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 8)
            self.box: list[Any] = [None]
            self.look: Any = lambda: (self.box if on_module else elsewhere)[0]

        def forward(self, x: Tensor) -> Tensor:
            if self.look() is not None:
                x = x + self.look().float()
            out: Tensor = self.head(self.body(x))
            return out

    class Holder:
        value: Any = None

    def run(model: Any) -> Gradients:
        x = batch()
        features = model.other(x)
        holder = Holder()
        holder.value = features
        model.forward_with = holder
        hidden = torch.tanh(features)
        (model.box if on_module else elsewhere)[0] = hidden
        loss = model(x).square().mean()
        elsewhere[0] = None
        loss.backward()
        return grads(model)

    assert outcome(Reads, run, policy) == (MENDED if on_module else FOUND)


@each_policy
def test_reentrant_checkpoint_in_a_float32_island_is_true(policy: str) -> None:
    """Its recomputation runs without autocast, as one outside the model would."""
    from torch.utils.checkpoint import checkpoint

    class Checkpoints(Base):
        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.body, x, use_reentrant=True)
            out: Tensor = self.head(torch.tanh(hidden))
            return out

    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = Checkpoints()
        if wrapped:
            wrapprec.wrap(model, policy=policy, rules=[("body", "float32")], loss_scale=SCALE)
        torch.manual_seed(1)
        model(batch().requires_grad_()).square().mean().backward()
        results.append(grads(model))
    for name, true in results[0].items():
        got = results[1][name]
        assert got is not None and true is not None
        assert (got - true).norm() <= 3 * TOLERANCE[policy[:2]] * true.norm(), name


@each_policy
def test_two_models_under_reentrant_checkpoints_are_true(policy: str) -> None:
    """The inner model's border is met in the same backward both inside and outside the checkpointed block."""
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.layer, self.inner = nn.Linear(8, 8), [inner]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner[0](self.layer(x))
            return out

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.stem, self.block = nn.Linear(8, 8), Block(inner)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.block, self.stem(x), use_reentrant=True)
            return out

    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        outer = Outer(inner)
        if wrapped:
            wrapprec.wrap([outer, inner], policy=policy, loss_scale=16)
        torch.manual_seed(1)
        x = batch()
        (outer(x).square().mean() + inner(x).square().mean()).backward()
        results.append({**grads(outer), **{f"inner.{k}": v for k, v in grads(inner).items()}})
    for name, true in results[0].items():
        got = results[1][name]
        assert got is not None and true is not None
        assert (got - true).norm() <= 3 * TOLERANCE[policy[:2]] * true.norm(), name


@each_policy
@pytest.mark.parametrize("keeps", [False, True])
def test_leaf_made_inside_forward_is_true_when_it_is_dropped_and_found_when_it_is_kept(
    policy: str, keeps: bool
) -> None:
    class MakesLeaf(Base):
        def forward(self, x: Tensor) -> Tensor:
            # What a wav2vec2 encoder does for checkpointing to work; nobody reads the gradient of this leaf.
            x = x[:, None]
            x.requires_grad = True
            if keeps:
                kept.append(x)
            return self.head(torch.tanh(self.body(x))) * x.mean()

    def run(model: Any) -> Gradients:
        model(batch()).square().mean().backward()
        return grads(model)

    kept: list[Tensor] = []
    true = FOUND if keeps else MENDED
    assert outcome(MakesLeaf, run, policy) == true


@each_policy
def test_view_of_an_output_beside_it_gets_one_border(policy: str) -> None:
    class BothWays(Base):
        def forward(self, x: Tensor) -> Answer:
            logits = self.head(torch.tanh(self.body(x)))
            # What contrastive models return: logits per image, and the same seen per text.
            return Answer(logits, {"transposed": logits.t()})

    def run(model: Any) -> Gradients:
        answer = model(batch())
        (answer.logits.square().mean() + answer.extra["transposed"].softmax(-1)[0].sum()).backward()
        return grads(model)

    assert outcome(BothWays, run, policy) == MENDED
