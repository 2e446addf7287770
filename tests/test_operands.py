"""Hand-written operations that low precision would break are mended, in the modules that have them and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import wrapprec
from wrapprec import DtypeMismatchError
from wrapprec.operands import mixes

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
each_policy = pytest.mark.parametrize("policy", POLICIES)
WIDTH, LENGTH = 8, 5
# Five roundings of a few bits each (weight, activation, product, softmax, gradient); wrong masks differ by 1 and more.
TOLERANCE = {"b": 5 * 2**-8, "1": 5 * 2**-11}


class MaskedAttention(nn.Module):
    """DeBERTa's way: the query is float32 after its bias is added, the scores are not, the mask is filled as for it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.bias = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        query = query + self.bias
        scores = query @ key.transpose(-1, -2)
        scores = scores.masked_fill(~keep, torch.finfo(torch.float32).min)
        return scores.softmax(-1) @ value


class BufferAttention(nn.Module):
    """GPT's way: scores are masked by a product with a float32 buffer, so that they meet the values in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("lower", torch.ones(LENGTH, LENGTH).tril())

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        scores = query @ key.transpose(-1, -2)
        scores = scores * self.lower + -1e4 * (1 - self.lower)
        return torch.matmul(scores.softmax(-1), value)


class FloatMaskAttention(nn.Module):
    """BERT's way, in a module without weights of its own: a float32 mask is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.inner = _AddsMask()

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
        return self.inner(*self.qkv(x).chunk(3, -1), mask)


class _AddsMask(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(query, key.transpose(-1, -2)) + mask
        return torch.matmul(scores.softmax(-1), value)


class Router(nn.Module):
    """A router's way: the scores of the experts are computed in float32 with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight).softmax(-1)


class Scatter(nn.Module):
    """An expert's way: weighted in float32, added up in a tensor of the activations' dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        low = self.fc(x).reshape(-1, WIDTH)
        index = torch.arange(low.shape[0]) % 3
        weighted = low.float() * torch.linspace(0, 1, low.shape[0])[:, None]
        return torch.zeros_like(low).index_add_(0, index, weighted)


class Puts(nn.Module):
    """A sampler's way: float32 tensors that are made on the spot take activations at indices, in every form."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        low = self.fc(x).reshape(-1, WIDTH)
        index = torch.arange(WIDTH).flip(0).expand_as(low)
        out = torch.zeros(low.shape).scatter(1, index, low) + torch.zeros(low.shape).scatter_add(1, index // 2, low)
        out = out + torch.ones(low.shape).scatter_reduce(1, index // 3, low, "mean")
        # An eighth: gradients at the first scale, 65536, stay within float16.
        return out.index_copy(1, torch.tensor([0, 2]), low[:, :2] * 2) / 8


class Model(nn.Module):
    """A linear layer before, so that activations are low precision, and one after."""

    def __init__(self, middle: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(WIDTH, WIDTH), middle(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x), keep))


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    keep = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool).tril()
    keep[1, :, 0] = False
    # The first row of the second example keeps nothing: in float32 the softmax is even there, and no nan.
    out = model(torch.randn(2, LENGTH, WIDTH), keep)
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def off(mine: Tensor, true: Tensor) -> float:
    assert mine.dtype == true.dtype == torch.float32
    return float((mine - true).norm() / true.norm())


@each_policy
@pytest.mark.parametrize("middle", [MaskedAttention, BufferAttention, FloatMaskAttention, Router, Scatter, Puts])
def test_code_that_is_right_in_float32_is_right_in_low_precision(middle: type[nn.Module], policy: str) -> None:
    torch.manual_seed(0)
    plain = Model(middle)
    model = copy.deepcopy(plain)
    out, grads = step(plain)
    wrapprec.wrap(model, policy=policy)
    my_out, my_grads = step(model)
    tolerance = TOLERANCE[policy[0]]
    assert off(my_out, out) < tolerance
    assert my_grads.keys() == grads.keys()
    for name, grad in grads.items():
        if grad.norm() > 1e-6:  # the key's bias has no influence on a softmax
            assert off(my_grads[name], grad) < 4 * tolerance, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_itself_refuses_the_mask_under_autocast(dtype: torch.dtype) -> None:
    # If this fails, torch has mended it: then so much less is left to do here.
    model = Model(MaskedAttention)
    with torch.autocast("cpu", dtype=dtype), pytest.raises(RuntimeError, match="without overflow"):
        step(model)


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 4)
        self.logits = torch.zeros(())

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.fc(x)
        self.logits = logits.detach()
        return F.cross_entropy(logits, target)


@pytest.mark.parametrize("policy", ["bf16-module", "16-module"])
def test_loss_that_forward_computes_is_float32_like_that_of_a_loss_module(policy: str) -> None:
    model = OwnLoss()
    wrapprec.wrap(model, policy=policy)
    x, target = torch.randn(6, WIDTH), torch.arange(6) % 4
    loss = model(x, target)
    assert model.logits.dtype in (torch.bfloat16, torch.float16)
    assert loss.dtype == torch.float32
    # Exactly the loss of these logits: in bfloat16 it would have eight bits.
    assert loss.item() == F.cross_entropy(model.logits.float(), target).item()


class Looks(nn.Module):
    """Notes how many modes are on while it runs."""

    modes = -1

    def forward(self, x: Tensor) -> Tensor:
        self.modes = torch._C._len_torch_function_stack()
        return x * 2


class MendedAroundPlain(nn.Module):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fc, self.inner, self.fails = nn.Linear(WIDTH, WIDTH), Looks(), fails
        self.before = self.after = -1

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        self.before = torch._C._len_torch_function_stack()
        x = self.inner(self.fc(x))
        self.after = torch._C._len_torch_function_stack()
        if self.fails:
            raise KeyError("on purpose")
        return torch.matmul(x, x.transpose(-1, -2)) @ x


def test_only_the_code_of_the_module_itself_runs_under_the_mode() -> None:
    model = Model(MendedAroundPlain)
    wrapprec.wrap(model, policy="bf16-module")
    step(model)
    middle = model.middle
    assert (middle.before, middle.inner.modes, middle.after) == (1, 0, 1)
    assert torch._C._len_torch_function_stack() == 0


@each_policy
def test_error_leaves_no_mode_behind(policy: str) -> None:
    model = Model(lambda: MendedAroundPlain(fails=True))
    wrapprec.wrap(model, policy=policy)
    with pytest.raises(KeyError, match="on purpose"):
        step(model)
    assert torch._C._len_torch_function_stack() == 0


class Counts(TorchFunctionMode):
    """A mode of the user's own, around a module below the one that is mended."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


class UnderAnotherMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.counts = nn.Linear(WIDTH, WIDTH), Counts()

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        with self.counts:
            x = self.fc(x)
        return torch.matmul(x.float(), x.transpose(-1, -2)) @ x


@each_policy
def test_mode_of_the_user_stays_on_for_the_modules_that_it_is_around(policy: str) -> None:
    model = Model(UnderAnotherMode)
    wrapprec.wrap(model, policy=policy)
    step(model)
    assert model.middle.counts.calls > 0
    assert torch._C._len_torch_function_stack() == 0


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + 1


@pytest.mark.parametrize(
    ("module", "by_op", "by_module"),
    [
        (MaskedAttention(), False, True),
        (BufferAttention(), False, True),
        (_AddsMask(), False, True),
        (Router(), False, True),
        (Scatter(), True, True),
        (OwnLoss(), False, True),
        (Plain(), False, False),
        (nn.MultiheadAttention(4, 2), False, False),
        (nn.BatchNorm1d(4), False, False),
        (nn.Sequential(nn.Linear(2, 2)), False, False),
    ],
)
def test_source_and_buffers_tell_which_modules_need_it(module: nn.Module, by_op: bool, by_module: bool) -> None:
    assert (mixes(module, by_module=False), mixes(module, by_module=True)) == (by_op, by_module)


class Unforeseen(nn.Module):
    """Mixes dtypes in a helper, which the source of the class does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return _helper(self.fc(x))


def _helper(x: Tensor) -> Tensor:
    return x.float() @ x.transpose(-1, -2) @ x


def test_what_is_not_foreseen_is_an_error_that_names_the_module_and_the_rule_that_helps() -> None:
    model = Model(Unforeseen)
    handle = wrapprec.wrap(model, policy="bf16-module")
    with pytest.raises(DtypeMismatchError, match=r'"middle".*\n.*Rule\("middle", "float32"\)'):
        step(model)
    handle.unwrap()
    wrapprec.wrap(model, policy="bf16-module", rules=[("middle", "float32")])
    step(model)


class WritesOut(nn.Module):
    """Writes a product with a float32 buffer into a tensor of its own, and adds rows, named by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("twice", torch.eye(WIDTH) * 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear(x)
        made = torch.full((LENGTH, WIDTH), 7.0)
        torch.matmul(rows, self.twice, out=made)
        return torch.index_add(input=made, dim=0, index=torch.arange(LENGTH), source=rows)


@pytest.mark.parametrize("policy", ["bf16-module", "16-module"])
def test_mended_products_are_written_into_the_tensor_that_was_given_for_them(policy: str) -> None:
    torch.manual_seed(0)
    model, x = WritesOut(), torch.randn(LENGTH, WIDTH)
    want = model.linear(x).detach() * 3
    wrapprec.wrap(model, policy=policy)
    with torch.no_grad():
        assert (model(x) - want).norm() <= TOLERANCE[policy[0]] * want.norm()
