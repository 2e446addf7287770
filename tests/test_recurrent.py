"""Recurrent networks give float32's results and gradients: packed, in chunks, and where torch has no kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import wrapprec
from wrapprec import DtypeMismatchError, Rule
from wrapprec.backends.recurrent import probe_rnn
from wrapprec.backends.select import backend_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:float16 on a CPU"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
LOW = {"bf": torch.bfloat16, "16": torch.float16}
# Ten units in the last place, in norm: inputs, weights, states and gradients are rounded at each of a few time steps.
# A scale that is left in a gradient is off by 65536, and a step too few in a recursion by tens of percent.
TOLERANCE = {"16": 10 * 2**-10, "bf": 10 * 2**-7}
CPU = torch.device("cpu")

each_policy = pytest.mark.parametrize("policy", POLICIES)

NETS: dict[str, Callable[[], nn.RNNBase]] = {
    "tanh": lambda: nn.RNN(6, 8),
    "relu": lambda: nn.RNN(6, 8, nonlinearity="relu"),
    "gru": lambda: nn.GRU(6, 8),
    "lstm": lambda: nn.LSTM(6, 8),
    "projected": lambda: nn.LSTM(6, 8, proj_size=4),
    "both ways": lambda: nn.GRU(6, 8, bidirectional=True),
    "both ways lstm": lambda: nn.LSTM(6, 8, bidirectional=True),
    "layers": lambda: nn.LSTM(6, 8, num_layers=2),
    "batch first": lambda: nn.GRU(6, 8, num_layers=2, batch_first=True),
    "no bias": lambda: nn.RNN(6, 8, bias=False),
}
each_net = pytest.mark.parametrize("kind", NETS)
Run = Callable[[Any], list[Tensor]]


def leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [t for part in tree if part is not None for t in leaves(part)]


def slopes(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_close(got: list[Tensor], want: list[Tensor], policy: str, slack: float = 1.0) -> None:
    assert len(got) == len(want) and want
    for number, (mine, true) in enumerate(zip(got, want, strict=True)):
        assert mine.dtype == true.dtype == torch.float32 and mine.shape == true.shape
        off = (mine - true).norm() / true.norm().clamp(min=1e-30)
        assert off <= slack * TOLERANCE[policy[:2]], f"tensor {number} of shape {tuple(true.shape)}: off by {off:.2e}"


def compare(make: Callable[[], nn.Module], run: Run, policy: str, slack: float = 1.0) -> nn.Module:
    """Run a program on a plain model and on a wrapped copy of it: it must return the same tensors."""
    torch.manual_seed(0)
    plain = make()
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy)
    torch.manual_seed(1)
    want = run(plain)
    assert all(true.norm() > 0 for true in want), "the reference shows nothing"
    torch.manual_seed(1)
    assert_close(run(mine), want, policy, slack)
    return mine


def state(net: nn.RNNBase, batch: int = 3) -> Any:
    """A hidden state in float32 that requires grad."""
    lines = net.num_layers * (2 if net.bidirectional else 1)
    hidden = torch.randn(lines, batch, net.proj_size or net.hidden_size, requires_grad=True)
    if net.mode != "LSTM":
        return hidden
    return hidden, torch.randn(lines, batch, net.hidden_size, requires_grad=True)


def weigh(tensors: list[Tensor]) -> Tensor:
    """A loss in which every element of every output counts differently; a mean, as the largest scale asks for."""
    return sum(((t * torch.linspace(0.5, 1.5, t.numel()).view_as(t)).mean() for t in tensors), torch.zeros(()))


@each_policy
@each_net
def test_outputs_states_and_all_gradients_are_float32s(policy: str, kind: str) -> None:
    def run(net: Any) -> list[Tensor]:
        x, hidden = torch.randn(5, 3, 6, requires_grad=True), state(net, 5 if net.batch_first else 3)
        out = leaves(net(x, hidden))
        weigh(out).backward()
        return [*(t.detach() for t in out), x.grad, *(t.grad for t in leaves(hidden)), *slopes(net)]  # type: ignore[list-item]

    compare(NETS[kind], run, policy)


@each_policy
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm", "projected", "both ways lstm", "batch first"])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_sequences_come_out_packed_with_true_gradients(policy: str, kind: str, is_sorted: bool) -> None:
    lengths = torch.tensor([5, 3, 1] if is_sorted else [3, 5, 1])

    def run(net: Any) -> list[Tensor]:
        first = net.batch_first
        x = torch.randn(*((3, 5, 6) if first else (5, 3, 6)), requires_grad=True)
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=is_sorted)
        out, hidden = net(packed, state(net))
        assert isinstance(out, PackedSequence) and out.data.dtype == torch.float32
        padded, again = pad_packed_sequence(out, batch_first=first)
        assert torch.equal(again, lengths)
        weigh([padded, *leaves(hidden)]).backward()
        return [padded.detach(), *(t.detach() for t in leaves(hidden)), x.grad, *slopes(net)]  # type: ignore[list-item]

    compare(NETS[kind], run, policy)


@each_policy
@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("cut", [True, False])
def test_state_is_carried_over_chunks_with_and_without_a_cut(policy: str, kind: str, cut: bool) -> None:
    def run(net: Any) -> list[Tensor]:
        x, hidden = torch.randn(6, 3, 6, requires_grad=True), state(net)
        given = leaves(hidden)
        total, seen = torch.zeros(()), []
        for chunk in x.split(2):
            out, hidden = net(chunk, hidden)
            assert all(t.dtype == torch.float32 for t in leaves(hidden))
            loss = weigh([out])
            seen.append(out.detach())
            if cut:
                loss.backward()
                hidden = tuple(t.detach() for t in hidden) if isinstance(hidden, tuple) else hidden.detach()
            else:
                total = total + loss
        if not cut:
            total.backward()
        return [*seen, x.grad, *(t.grad for t in given), *slopes(net)]

    compare(NETS[kind], run, policy)


class Cells(nn.Module):
    """A loop over time that somebody wrote, with a module around it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        makes: dict[str, Any] = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
        self.cell = makes[kind](6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, outs = None, []
        for step in x:
            hidden = self.cell(step, hidden)
            outs.append(self.head(hidden[0] if isinstance(hidden, tuple) else hidden))
        return torch.stack(outs)


@each_policy
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_cells_in_a_hand_written_loop_are_true(policy: str, kind: str) -> None:
    def run(model: Any) -> list[Tensor]:
        x = torch.randn(5, 3, 6, requires_grad=True)
        out = model(x)
        weigh([out]).backward()
        return [out.detach(), x.grad, *slopes(model)]

    compare(lambda: Cells(kind), run, policy)


@each_policy
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_cells_wrapped_alone_take_and_give_float32_states(policy: str, kind: str) -> None:
    def run(cell: Any) -> list[Tensor]:
        x, h = torch.randn(3, 6, requires_grad=True), torch.randn(3, 8, requires_grad=True)
        hidden: Any = (h, torch.randn(3, 8)) if kind == "lstm" else h
        for _ in range(3):
            hidden = cell(x, hidden)
            assert all(t.dtype == torch.float32 for t in leaves(hidden))
        weigh(leaves(hidden)).backward()
        return [*(t.detach() for t in leaves(hidden)), x.grad, h.grad, *slopes(cell)]  # type: ignore[list-item]

    compare(lambda: Cells(kind).cell, run, policy)


@each_policy
def test_dropout_between_layers_drops_the_same_units_when_trained_in_float32_and_none_in_eval(policy: str) -> None:
    net = nn.GRU(6, 64, num_layers=2, dropout=0.5)
    wrapprec.wrap(net, policy=policy)
    x = torch.randn(5, 3, 6)
    torch.manual_seed(3)
    one = net(x)[0]
    other = net(x)[0]
    torch.manual_seed(3)
    again = net(x)[0]
    assert torch.equal(one, again) and not torch.equal(one, other)
    net.eval()
    plain = copy.deepcopy(net)
    wrapprec.unwrap(plain)
    assert_close([net(x)[0].detach()], [plain(x)[0].detach()], policy)


def _deepcopied(net: nn.RNNBase) -> nn.RNNBase:
    return copy.deepcopy(net)


def _moved(net: nn.RNNBase) -> nn.RNNBase:
    return net.to(torch.float64).to(torch.float32)


def _loaded(net: nn.RNNBase) -> nn.RNNBase:
    net.load_state_dict({name: value * 1.0 for name, value in net.state_dict().items()}, assign=True)
    return net


def _flattened(net: nn.RNNBase) -> nn.RNNBase:
    net.flatten_parameters()
    return net


def _strided(net: nn.RNNBase) -> nn.RNNBase:
    for weight in net.parameters():
        if weight.dim() == 2:
            weight.data = weight.data.t().contiguous().t()
    return net


@each_policy
@pytest.mark.parametrize("change", [_deepcopied, _moved, _loaded, _flattened, _strided], ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_weights_that_were_copied_moved_or_loaded_since_wrap_are_the_ones_used(
    policy: str, change: Any, kind: str
) -> None:
    torch.manual_seed(0)
    plain = NETS[kind]()
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy)
    x = torch.randn(5, 3, 6)
    mine(x)
    mine = change(mine)
    for net in (plain, mine):
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(1.5)  # a stale list of weights would not have this
        out = leaves(net(x))
        weigh(out).backward()
    assert_close(slopes(mine), slopes(plain), policy)
    assert all(a is b for a, b in zip(mine._flat_weights, mine.parameters(), strict=True))


@each_policy
@pytest.mark.parametrize("kind", ["gru", "lstm", "layers"])
def test_eval_inference_and_frozen_give_what_training_gives(policy: str, kind: str) -> None:
    torch.manual_seed(0)
    plain = NETS[kind]().eval()
    mine = copy.deepcopy(plain)
    handle = wrapprec.wrap(mine, policy=policy)
    x = torch.randn(5, 3, 6)
    want = [t.detach() for t in leaves(plain(x))]
    trained = [t.detach() for t in leaves(mine(x))]
    with torch.no_grad():
        quiet = leaves(mine(x))
    with torch.inference_mode():
        inferred = [t.clone() for t in leaves(mine(x))]
    with handle.frozen(), torch.no_grad():
        frozen = leaves(mine(x))
    for got in (trained, quiet, inferred, frozen):
        assert_close(got, want, policy)
    mine.train()
    weigh(leaves(mine(x))).backward()
    weigh(leaves(plain.train()(x))).backward()
    assert_close(slopes(mine), slopes(plain), policy)


@each_policy
def test_network_inside_a_model_gets_activations_and_gives_them_to_the_next_layer(policy: str) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 6)
            self.lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
            self.norm = nn.LayerNorm(16)
            self.head = nn.Linear(16, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.head(self.norm(self.lstm(self.embed(tokens))[0]))
            return out

    def run(model: Any) -> list[Tensor]:
        out = model(torch.randint(0, 20, (3, 5)))
        weigh([out]).backward()
        return [out.detach(), *slopes(model)]

    compare(Tagger, run, policy, slack=2)  # an embedding, a norm and a head more


# Where torch has no kernel


def runs_half_lstm() -> bool:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        try:
            nn.LSTM(4, 4)(torch.randn(2, 2, 4))
        except RuntimeError:
            return False
    return True


def test_lstm_without_a_float16_kernel_is_planned_in_float32_and_the_plan_says_why() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 8), nn.GRU(8, 8))
    plan = wrapprec.resolve(model, "16-mixed")
    lstm = plan.placement("1")
    if runs_half_lstm():
        assert lstm.rule == "policy" and lstm.precision.compute_dtype == torch.float16
    else:
        assert lstm.rule == "default: no float16 LSTM on this cpu under autocast"
        assert lstm.reason == "computed in float32: no float16 LSTM on this cpu under autocast, probed"
        assert lstm.precision.compute_dtype == lstm.precision.output_dtype == torch.float32
        assert lstm.rule in str(plan)
    assert plan.placement("0").precision.compute_dtype == torch.float16
    # The others run: nothing is given up that need not be.
    assert plan.placement("2").rule == "policy"
    for policy in ("bf16-mixed", "bf16-module", "16-module"):
        assert wrapprec.resolve(model, policy).placement("1").rule == "policy"


def test_plan_follows_the_probe_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def runs(module: nn.Module, dtype: torch.dtype, autocasts: bool, device: torch.device) -> bool:
        if isinstance(module, nn.RNNBase):
            asked.append((type(module).__name__, dtype, autocasts, device.type))
        return not isinstance(module, nn.GRU)

    monkeypatch.setattr(backend_for("cpu"), "runs_rnn", runs)
    model = nn.Sequential(nn.LSTM(4, 4), nn.GRU(4, 4))
    plan = wrapprec.resolve(model, "bf16-module")
    assert plan.placement("0").rule == "policy"
    assert plan.placement("1").rule == "default: no bfloat16 GRU on this cpu"
    assert ("GRU", torch.bfloat16, False, "cpu") in asked
    asked.clear()
    assert wrapprec.resolve(model, "32-true").placement("1").rule == "policy" and not asked


def test_probe_tells_what_torch_does_and_leaves_no_trace() -> None:
    before = torch.random.get_rng_state()
    assert probe_rnn("LSTM", torch.float16, True, CPU) == runs_half_lstm()
    torch.random.set_rng_state(before)
    with torch.no_grad(), torch.inference_mode():
        for kind in ("RNN", "GRU", "LSTM"):
            assert probe_rnn(kind, torch.bfloat16, True, CPU) and probe_rnn(kind, torch.float16, False, CPU)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_kernel_that_runs_but_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    true = nn.GRU.forward
    monkeypatch.setattr(nn.GRU, "forward", lambda self, x: (true(self, x)[0] * (1 + (x.dtype != torch.float32)), None))
    assert not probe_rnn("GRU", torch.bfloat16, False, CPU)


@pytest.mark.skipif(runs_half_lstm(), reason="this CPU has a float16 LSTM")
def test_rule_that_asks_for_the_missing_kernel_wins_with_a_note_and_an_error_that_names_the_remedy() -> None:
    model = nn.Sequential(nn.Identity(), nn.LSTM(6, 8))
    handle = wrapprec.wrap(model, policy="16-mixed", rules=[Rule(nn.LSTM, "16-mixed")])
    note = "no float16 LSTM on this cpu under autocast: drop the rule if it fails"
    assert handle.plan.placement("1").notes == (note,)
    with pytest.raises(DtypeMismatchError) as caught:
        model(torch.randn(5, 3, 6))
    text = str(caught.value)
    assert "Expected a module in a dtype that its kernel computes in on this device" in text
    assert "Received: could not create a primitive" in text and '"1" (LSTM)' in text
    assert 'rules=[Rule("1", "float32")]' in text
    # What does run is not forbidden: packed sequences take another kernel.
    out, _ = model[1](pack_padded_sequence(torch.randn(5, 3, 6), torch.tensor([5, 3, 1])))
    assert out.data.dtype == torch.float32 and out.data.isfinite().all()


def test_rule_for_a_parent_leaves_the_fallback_of_the_network_below_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.LSTM(6, 8)))
    plan = wrapprec.resolve(model, "32-true", rules=[Rule("0", "16-mixed")])
    wanted = "rule 1" if runs_half_lstm() else "default: no float16 LSTM"
    assert plan.placement("0.0").rule.startswith(wanted)
