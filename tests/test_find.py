"""`wrapprec run` inside this process: which models of a script are found, and that it trains as in float32."""

from __future__ import annotations

import importlib
import multiprocessing.process
import pickle
import sys
import textwrap
import threading
import traceback
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

import wrapprec
from wrapprec.migrate.apex.session import session as apex_session
from wrapprec.migrate.find import Finder
from wrapprec.migrate.roots import roots_of
from wrapprec.migrate.run import Session
from wrapprec.migrate.script import Program, execute

PREAMBLE = """
import contextlib, itertools, torch
from torch import nn
import torch.nn.functional as F
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self, a=4, b=2):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(a, 8), nn.Linear(8, b)
    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))
def batches(n=6, a=4):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, a, generator=g), torch.randn(8, 2, generator=g)) for _ in range(n)]
losses = []
"""

LOOP = """
for x, y in batches():
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

# By name: the script, and what is found in it.
SCRIPTS: dict[str, tuple[str, list[str]]] = {
    "plain": ("model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)" + LOOP, ["Net (58 p"]),
    "optimizer first, then device": (
        "model = Net()\noptimizer = torch.optim.Adam(model.parameters(), 0.1)\nmodel.to('cpu').train()" + LOOP,
        ["Net (58 parameters, Adam)"],
    ),
    "evaluation first": (
        "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)\nmodel.eval()\n"
        "with torch.no_grad():\n    losses.append(F.mse_loss(model(batches()[0][0]), batches()[0][1]).item())\n"
        "model.train()" + LOOP,
        ["Net (58 p"],
    ),
    "parts are called, not the whole": (
        "class Trainer:\n    def __init__(self):\n        self.net = Net()\n"
        "        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.5)\n"
        "    def fit(self):\n        for x, y in batches():\n            h = torch.tanh(self.net.encoder(x))\n"
        "            loss = F.mse_loss(self.net.decoder(h), y)\n            self.optimizer.zero_grad()\n"
        "            loss.backward()\n            self.optimizer.step()\n            losses.append(loss.item())\n"
        "Trainer().fit()",
        ["Net (58 p"],
    ),
    "one optimizer for two models": (
        "one, two = nn.Linear(4, 8), nn.Linear(8, 2)\n"
        "model = lambda x: two(torch.tanh(one(x)))\n"
        "optimizer = torch.optim.SGD(itertools.chain(one.parameters(), two.parameters()), lr=0.5)" + LOOP,
        ["Linear and Linear (58 parameters, SGD)"],
    ),
    "two optimizers for one model": (
        "model = Net()\noptimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.5)\n"
        "other = torch.optim.Adam(model.decoder.parameters(), lr=0.1)" + LOOP + "    other.step(); other.zero_grad()",
        ["Net (58 parameters, SGD and Adam)"],
    ),
    "a GAN": (
        "G, D = Net(4, 6), Net(6, 1)\n"
        "g, d = (torch.optim.Adam(m.parameters(), lr=0.01, eps=1e-2) for m in (G, D))\n"
        "for z, _ in batches():\n    d.zero_grad()\n    fake = G(z)\n"
        "    loss_d = D(fake.detach()).mean() - D(torch.ones(8, 6)).mean()\n    loss_d.backward()\n    d.step()\n"
        "    g.zero_grad()\n    loss_g = -D(fake).mean()\n    loss_g.backward()\n    g.step()\n"
        "    losses += [loss_d.item(), loss_g.item()]",
        ["Net (94 parameters, Adam)", "Net (65 parameters, Adam)"],
    ),
    "another meaning of parameters": (
        "class Groups(Net):\n    def parameters(self, lr):\n"
        "        return [{'params': m.parameters(), 'lr': lr} for m in (self.encoder, self.decoder)]\n"
        "model = Groups()\noptimizer = torch.optim.SGD(model.parameters(0.5))" + LOOP,
        ["Groups (58 p"],
    ),
    "clipped accumulation with a schedule": (
        "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)\n"
        "schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)\n"
        "for step, (x, y) in enumerate(batches(8)):\n    loss = F.mse_loss(model(x), y) / 2\n    loss.backward()\n"
        "    losses.append(loss.item())\n    if step % 2:\n"
        "        losses.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())\n"
        "        optimizer.step(); schedule.step(); optimizer.zero_grad()",
        ["Net (58 p"],
    ),
    "a head on a frozen backbone": (
        "model = Net()\nmodel.encoder.requires_grad_(False)\n"
        "optimizer = torch.optim.SGD(model.decoder.parameters(), lr=0.5)" + LOOP,
        ["Net (58 p"],
    ),
    "another optimizer half way": (
        "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)" + LOOP + "\n"
        "optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-2)" + LOOP,
        ["Net (58 p"],
    ),
    "the loss is a module around the model": (
        "class WithLoss(nn.Module):\n    def __init__(self, net):\n        super().__init__()\n        self.net = net\n"
        "    def forward(self, x, y):\n        return F.mse_loss(self.net(x), y)\n"
        "net = Net()\noptimizer = torch.optim.SGD(net.parameters(), lr=0.5)\nboth = WithLoss(net)\n"
        "for x, y in batches():\n    optimizer.zero_grad()\n    loss = both(x, y)\n    loss.backward()\n"
        "    optimizer.step()\n    losses.append(loss.item())",
        ["WithLoss (58 p"],
    ),
    "a closure": (
        "model = Net()\noptimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)\n"
        "for x, y in batches():\n    def closure():\n        optimizer.zero_grad()\n"
        "        loss = F.mse_loss(model(x), y)\n        loss.backward()\n        return loss\n"
        "    losses.append(optimizer.step(closure).item())",
        ["Net (58 p"],
    ),
    "a GradScaler without autocast": (
        "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)\n"
        "scaler = torch.amp.GradScaler('cpu', init_scale=16.0)\n"
        "for x, y in batches():\n    optimizer.zero_grad()\n    loss = F.mse_loss(model(x), y)\n"
        "    scaler.scale(loss).backward()\n    scaler.unscale_(optimizer)\n"
        "    losses.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())\n"
        "    scaler.step(optimizer); scaler.update()\n    losses.append(loss.item())",
        ["Net (58 p"],
    ),
    "a frozen teacher, and an input that is trained": (
        "teacher, model = Net().requires_grad_(False), Net()\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.5)\n"
        "image = torch.zeros(8, 4, requires_grad=True)\nother = torch.optim.SGD([image], lr=0.5)\n"
        "for x, y in batches():\n    optimizer.zero_grad(); other.zero_grad()\n"
        "    loss = F.mse_loss(model(x + image), teacher(x)) + image.square().mean()\n    loss.backward()\n"
        "    optimizer.step(); other.step()\n    losses.append(loss.item())",
        ["Net (58 p"],
    ),
    "Apex": (
        "from apex import amp\nfrom apex.optimizers import FusedAdam\nimport apex.parallel as parallel\nimport apex\n"
        "from apex.fp16_utils import *\nfrom apex.multi_tensor_apply import multi_tensor_applier\n"
        "model = Net()\noptimizer = FusedAdam(model.parameters(), lr=0.01, eps=1e-2)\n"
        "model, optimizer = amp.initialize(model, optimizer, opt_level='O1', verbosity=0)\n"
        "for x, y in batches():\n    optimizer.zero_grad()\n    loss = F.mse_loss(model(x), y)\n"
        "    with amp.scale_loss(loss, optimizer) as scaled_loss:\n        scaled_loss.backward()\n"
        "    nn.utils.clip_grad_norm_(amp.master_params(optimizer), 0.1)\n    optimizer.step()\n"
        "    losses.append(loss.item())\nassert apex.amp is amp and apex.parallel is parallel",
        ["Net (58 p"],
    ),
}


class Ran:
    """What a script left behind, and what was said meanwhile."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.said: list[str] = []
        self.session: Any = None

    @property
    def labels(self) -> list[str]:
        return [found.label for found in self.session.finder.found]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a script in this process as `wrapprec run` would."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    apex_session.calls, apex_session.enabled = [], None
    before = (
        Optimizer.__init__,
        nn.Module.__call__,
        list(sys.meta_path),
        torch.multiprocessing.start_processes,
        multiprocessing.process.BaseProcess.start,
        torch.jit.trace,
        torch.save,
        pickle.dump,
        nn.Module.__reduce_ex__,
        traceback.TracebackException.__init__,
        threading.excepthook,
    )

    def run(source: str, policy: str, dry_run: bool = False) -> Ran:
        ran = Ran()
        script = tmp_path / "script.py"
        script.write_text(PREAMBLE + textwrap.dedent(source))
        sys.path.insert(0, "what the interpreter put there")
        ran.session = Session(policy, dry_run, ran.said.append)
        ran.session.start()
        try:
            code, main = Program(str(script), False, ()).load()
            ran.names = main.__dict__
            execute(code, main)
        finally:
            ran.watches = nn.Module.__call__ is not before[1]  # type: ignore[attr-defined]
            ran.session.stop()
        return ran

    yield run
    after = (
        Optimizer.__init__,
        nn.Module.__call__,
        list(sys.meta_path),
        torch.multiprocessing.start_processes,
        multiprocessing.process.BaseProcess.start,
        torch.jit.trace,
        torch.save,
        pickle.dump,
        nn.Module.__reduce_ex__,
        traceback.TracebackException.__init__,
        threading.excepthook,
    )
    assert after == before
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def _curve(source: str) -> list[float]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(PREAMBLE + source.replace("apex", "wrapprec.migrate.apex"), names)
    found: list[float] = names["losses"]
    return found


def _plain(name: str) -> list[float]:
    source = SCRIPTS[name][0]
    if name == "Apex":  # by hand, without amp
        source = (
            "model = Net()\noptimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-2, weight_decay=0)\n"
            "for x, y in batches():\n    optimizer.zero_grad()\n    loss = F.mse_loss(model(x), y)\n"
            "    loss.backward()\n    nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n    optimizer.step()\n"
            "    losses.append(loss.item())\n"
        )
    return _curve(source)


# A scale that does not overflow at first: a skipped first step would shift the curve.
@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed,init_scale=64", "16-module,init_scale=64"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_trains_to_the_same_curve_as_in_float32(run: Any, name: str, policy: str) -> None:
    ran = run(SCRIPTS[name][0], policy)
    want = torch.tensor(_plain(name))
    # Losses of order one, from activations that are rounded to 8 (11) bits, after some steps in rounded directions.
    bound = 4 * 2**-8 if policy.startswith("bf16") else 8 * 2**-11
    assert (torch.tensor(ran.names["losses"]) - want).abs().max() <= bound * want.abs().max()
    assert [label.startswith(start) for label, start in zip(ran.labels, SCRIPTS[name][1], strict=True)].count(
        False
    ) == 0
    assert all(found.reason is None for found in ran.session.finder.found)


def test_float32_policy_changes_nothing(run: Any) -> None:
    assert run(SCRIPTS["a GAN"][0], "32-true").names["losses"] == _plain("a GAN")


def test_low_precision_is_really_used(run: Any) -> None:
    assert run(SCRIPTS["plain"][0], "bf16-mixed").names["losses"] != _plain("plain")


def test_calls_are_watched_only_until_every_optimizer_has_its_model(run: Any) -> None:
    assert run(SCRIPTS["a GAN"][0], "bf16-mixed").watches is False
    assert run(SCRIPTS["a frozen teacher, and an input that is trained"][0], "bf16-mixed").watches is True


def test_watch_ends_where_an_optimizer_was_dropped(run: Any) -> None:
    source = "torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1)\n" + SCRIPTS["plain"][0]
    assert run(source, "bf16-mixed").watches is False


def test_model_without_shapes_yet_is_found(run: Any) -> None:
    source = "model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 2))\n"
    source += "optimizer = torch.optim.SGD(model.parameters(), lr=0.5)" + LOOP
    ran = run(source, "bf16-mixed")
    want = torch.tensor(_curve(source))
    assert (torch.tensor(ran.names["losses"]) - want).abs().max() <= 4 * 2**-8 * want.abs().max()
    assert ran.session.finder.found[0].reason is None


def test_model_whose_training_begins_late_is_found(run: Any) -> None:
    source = SCRIPTS["plain"][0].replace("for x, y", "for _ in range(2000): other(torch.ones(1))\nfor x, y")
    ran = run("other = nn.Linear(1, 1)\n" + source, "bf16-mixed")
    assert [found.label for found in ran.session.finder.found] == ["Net (58 parameters, SGD)"]
    assert ran.session.finder.found[0].reason is None
    want = torch.tensor(_curve("other = nn.Linear(1, 1)\n" + source))
    assert (torch.tensor(ran.names["losses"]) - want).abs().max() <= 4 * 2**-8 * want.abs().max()


def test_watch_passes_by_what_no_optimizer_has(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    note = Finder._note_low
    monkeypatch.setattr(Finder, "_note_low", lambda self, module: looked.append(module) or note(self, module))
    source = "other = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1)\nlayer = nn.Linear(1, 1)\n"
    assert run(source + "for _ in range(2000): layer(torch.ones(1))", "bf16-mixed").watches is True
    assert len(looked) == 1001


def test_optimizer_made_later_is_guarded(run: Any) -> None:
    ran = run(SCRIPTS["another optimizer half way"][0], "16-mixed")
    assert len(ran.session.finder.found) == 1
    before = [p.detach().clone() for p in ran.names["model"].parameters()]
    for param in ran.names["model"].parameters():
        param.grad = torch.full_like(param, torch.inf)
    ran.names["optimizer"].step()
    assert all(torch.equal(a, b) for a, b in zip(before, ran.names["model"].parameters(), strict=True))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "for x, y in batches():\n    with torch.autocast('cpu', dtype=torch.bfloat16):\n        out = model(x)\n"
            "    optimizer.zero_grad(); F.mse_loss(out.float(), y).backward(); optimizer.step()\n"
            "    losses.append(F.mse_loss(out.float(), y).item())",
            "the script calls it under torch.autocast",
        ),
        (
            "model.to(torch.bfloat16)\n"
            "for x, y in batches():\n    loss = F.mse_loss(model(x.bfloat16()).float(), y)\n"
            "    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())",
            "its parameters are bfloat16",
        ),
        (
            "model.double()\n"
            "for x, y in batches():\n    loss = F.mse_loss(model(x.double()), y.double())\n"
            "    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())",
            "its parameters are float64",
        ),
    ],
)
def test_script_with_its_own_precision_is_left_alone(run: Any, source: str, reason: str) -> None:
    source = "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)\n" + source
    ran = run(source, "16-mixed")
    assert ran.names["losses"] == _curve(source)
    [line] = ran.said
    assert line.startswith("left Net (58 parameters, SGD) alone, because ") and reason in line and "\n" not in line
    assert wrapprec.handle_of(ran.names["model"]) is None and ran.watches is False


def test_script_of_an_accelerator_with_its_own_precision_is_left_alone(run: Any) -> None:
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, PartialState

    source = (
        "from accelerate import Accelerator\naccelerator = Accelerator(mixed_precision='bf16', cpu=True)\n"
        "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)\n"
        "model, optimizer = accelerator.prepare(model, optimizer)\n"
        "for x, y in batches():\n    loss = F.mse_loss(model(x), y)\n    optimizer.zero_grad()\n"
        "    accelerator.backward(loss)\n    optimizer.step(); losses.append(loss.item())"
    )
    try:
        ran = run(source, "16-mixed")
        assert ran.said == [
            "left Net (58 parameters, SGD) alone, because wrapprec refuses it: Accelerator(mixed_precision='bf16')"
        ]
        assert ran.session.summary() == ""
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()


def test_script_that_wraps_its_models_itself_is_left_as_it_is(run: Any) -> None:
    source = (
        "import wrapprec\nmodel = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)\n"
        "handle = wrapprec.wrap(model, optimizer, 'bf16-module')" + LOOP
    )
    ran = run(source, "16-mixed")
    assert str(ran.names["handle"].policy) == "bf16-module" and ran.said == []
    assert ran.session.summary().splitlines()[0] == (
        "wrapped Net (58 parameters, SGD): bf16-module, skipped steps 0, final loss scale none"
    )


def test_optimizer_that_a_script_made_for_its_own_wrapped_model_is_left_to_it(run: Any) -> None:
    source = (
        "import wrapprec\nmodel = Net()\nfirst = torch.optim.SGD(model.parameters(), lr=0.5)\n"
        "handle = wrapprec.wrap(model, first, 'bf16-module')\nmodel(batches()[0][0])\n"
        "optimizer = torch.optim.Adam(model.parameters(), lr=0.1)" + LOOP
    )
    ran = run(source, "16-mixed")
    assert "step" not in vars(ran.names["optimizer"]) and len(ran.session.finder.found) == 1


def test_model_whose_float32_copies_are_trained_is_left_alone_with_a_reason(run: Any) -> None:
    source = (
        "model = Net().half()\nmasters = [p.detach().clone().float().requires_grad_() for p in model.parameters()]\n"
        "optimizer = torch.optim.SGD(masters, lr=0.5)\n"
        "for x, y in batches():\n    loss = F.mse_loss(model(x.half()).float(), y)\n    model.zero_grad()\n"
        "    loss.backward()\n    for p, m in zip(model.parameters(), masters): m.grad = p.grad.float()\n"
        "    optimizer.step()\n    for p, m in zip(model.parameters(), masters): p.data.copy_(m.data)\n"
        "    losses.append(loss.item())"
    )
    ran = run(source, "16-mixed")
    assert ran.names["losses"] == _curve(source) and ran.session.summary() == ""
    assert ran.said == [
        "left Net (58 parameters) alone, because its parameters are float16, and no optimizer has them: its precision"
        " is the script's own"
    ]


def test_search_over_models_keeps_none_of_them_and_is_told_in_one_line(run: Any) -> None:
    source = (
        "import gc, weakref\nrefs = []\ndef fold():\n    torch.manual_seed(0)\n    model = Net()\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=FUSED)\n    for scale in (1e6, 1.0):\n"
        "        optimizer.zero_grad()\n        (scale * model(batches()[0][0]).sum()).backward()\n"
        "        optimizer.step()\n    refs.extend(map(weakref.ref, (model, optimizer, model.encoder.weight)))\n"
        "for _ in range(3):\n    fold()\ngc.collect()\nalive = [ref() for ref in refs]"
    )
    for fused in ("False", "True"):  # counted on the host, and on the device
        ran = run(source.replace("FUSED", fused), "16-mixed, init_scale=4096")
        assert ran.names["alive"] == [None] * 9
        lines = [line for line in ran.session.summary().splitlines() if line.startswith("wrapped")]
        assert len(lines) == 1 and lines[0].endswith(", skipped steps 1, final loss scale 2048; 3 such models")


def test_dry_run_prints_the_plan_and_ends_at_the_first_training_forward(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("print('before')\n" + SCRIPTS["evaluation first"][0] + "\nprint('after')", "16-mixed", dry_run=True)
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "before" in out and "after" not in out
    assert "policy      16-mixed" in out and "encoder" in out


EXPORT = """
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8), nn.Linear(8, 2)
    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(0))[0][0])
model = Recurrent()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
"""


# Alone, the script records its float32 model, with gradients too; a wrapped one would be refused under a loss scale.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:The tensor attributes"
)
@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed,init_scale=64"])
@pytest.mark.parametrize(
    "record", ["torch.jit.trace(model, (x,))", "torch.jit.script(model)", "torch.export.export(model, (x,)).module()"]
)
def test_script_exports_its_model_as_it_would_alone_and_trains_on(run: Any, record: str, policy: str) -> None:
    source = EXPORT + LOOP + f"    recorded = {record}\n"
    ran = run(source, policy)
    trained = dict(ran.names["model"].named_parameters())
    assert ran.names["recorded"].state_dict().keys() == trained.keys()
    got, x = ran.names["recorded"](ran.names["x"]), ran.names["x"]
    wrapprec.unwrap(ran.names["model"])
    # The same float32 kernels on the same weights, fused otherwise at most; bfloat16 would be off by 2**-9.
    assert torch.allclose(got, ran.names["model"](x), rtol=1e-5, atol=1e-6)
    want = torch.tensor(_curve(EXPORT + LOOP))
    assert (torch.tensor(ran.names["losses"]) - want).abs().max() <= 4 * 2**-8 * want.abs().max()
    assert ran.names["losses"] != want.tolist()  # and in low precision


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_with_low_precision_weights_is_recorded_as_it_is(run: Any) -> None:
    source = "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)" + LOOP
    ran = run(source + "recorded = torch.jit.trace(model, (x,))\nout = recorded(x)", "p=bf16,c=bf16,o=f32")
    assert torch.equal(ran.names["out"], ran.names["model"](ran.names["x"]))


def test_summary_says_what_was_wrapped_and_what_came_of_it(run: Any) -> None:
    source = (
        "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5)\n"
        "for scale in (1e6, 1.0):\n    optimizer.zero_grad()\n"
        "    (scale * model(batches()[0][0]).sum()).backward()\n    optimizer.step()\n"
    )
    ran = run(source, "16-mixed, init_scale=4096")
    line = ran.session.summary().splitlines()[0]
    assert line == (
        "wrapped Net (58 parameters, SGD): params=float32,compute=float16,output=float32,loss_scale=dynamic,"
        "init_scale=4096.0, skipped steps 1, final loss scale 2048"
    )
    assert "nothing was wrapped" in run("x = 1", "bf16-mixed").session.summary()


def test_warnings_of_wrap_are_said_and_those_of_others_are_theirs(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from wrapprec.migrate import find

    def warns(*given: Any) -> Any:
        warnings.warn("ours", wrapprec.WrapprecWarning, stacklevel=1)
        warnings.warn("theirs", UserWarning, stacklevel=1)
        return wrapprec.wrap(*given)

    monkeypatch.setattr(find, "wrap", warns)
    with pytest.warns(UserWarning, match="theirs"):
        ran = run(SCRIPTS["plain"][0], "bf16-mixed")
    assert ran.said == ["ours"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_roots_own_every_parameter_of_the_optimizer_and_overlap_nowhere(parents: list[int], data: Any) -> None:
    modules = [nn.ParameterList([nn.Parameter(torch.zeros(1))])]
    for number, parent in enumerate(parents):  # any tree, and a second one where the parent is 5
        modules.append(nn.ParameterList([nn.Parameter(torch.zeros(1))]))
        if parent < 5:
            modules[parent % (number + 1)].add_module(f"child{number}", modules[-1])
    chosen = data.draw(st.lists(st.sampled_from(modules), min_size=1, unique_by=id))
    called = data.draw(st.sampled_from(chosen))
    needed = {id(param) for module in chosen for param in module._parameters.values()}
    roots = roots_of(called, needed, modules)
    assert needed <= {id(param) for root in roots for param in root.parameters()}
    below = [id(module) for root in roots for module in root.modules()]
    assert len(below) == len(set(below)) and id(called) in below
    for root in roots:  # no child of a root would do in its place
        mine = needed & {id(param) for param in root.parameters()}
        inside = [child for child in root.children() if mine <= {id(param) for param in child.parameters()}]
        assert root is called or not inside or all(id(called) not in map(id, c.modules()) for c in inside)


def test_modules_that_were_not_built_to_the_end_are_passed_over() -> None:
    unfinished = object.__new__(nn.Linear)
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert roots_of(one, {id(param) for param in (*one.parameters(), *two.parameters())}) == [one, two]
    assert not vars(unfinished)


# Apex, where it is not installed


def test_libraries_are_not_told_that_there_is_apex(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "looks_for_apex.py").write_text(
        "import importlib.util\ntry:\n    import apex\nexcept ImportError:\n    apex = None\n"
        "if importlib.util.find_spec('apex'):\n    apex = 'found'\n"
        "try:\n    importlib.import_module('apex')\nexcept ImportError:\n    pass\nelse:\n    apex = 'imported'\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    source = "import importlib.util, looks_for_apex\nfirst = looks_for_apex.apex\n"
    ran = run(source + "mine = importlib.util.find_spec('apex')\nfrom apex import amp\n", "bf16-mixed")
    assert (
        ran.names["first"] is None
        and ran.names["mine"] is not None
        and ran.names["amp"].__name__ == "wrapprec.migrate.apex.amp"
    )
    assert ran.said[0] == "Apex's amp is not installed: wrapprec.migrate.apex stands in for it"


def test_amp_stands_in_for_what_an_installed_apex_has_no_more(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib" / "apex").mkdir(parents=True)
    (tmp_path / "lib" / "apex" / "__init__.py").write_text("kernels = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    ran = run("import apex\nfrom apex import amp\nspec = amp.__spec__.name", "bf16-mixed")
    assert ran.names["apex"].kernels == 3 and ran.names["spec"] == "wrapprec.migrate.apex.amp"


def test_parts_of_apex_that_nothing_stands_in_for_are_missing_with_what_to_use(run: Any) -> None:
    source = (
        "import importlib.util\nfound = importlib.util.find_spec('apex.contrib')\n"
        "try:\n    import apex.contrib.xentropy\nexcept ImportError as error:\n    missing = str(error)\n"
        "try:\n    from apex.parallel import nothing\nexcept ImportError as error:\n    part = str(error)\n"
        "try:\n    import apexes\nexcept ImportError as error:\n    other = error.name"
    )
    ran = run(source, "bf16-mixed")
    assert ran.names["found"] is None and ran.names["other"] == "apexes"
    assert ran.names["missing"] == (
        "Expected a part of Apex that wrapprec.migrate.apex stands in for.\n"
        "Received: an import of apex.contrib\nRemedy: use torch's own: cross_entropy(label_smoothing=...),"
        " scaled_dot_product_attention, GroupNorm"
    )
    assert "cannot import name 'nothing' from 'wrapprec.migrate.apex.parallel'" in ran.names["part"]
    with pytest.raises(ImportError):
        importlib.import_module("apex.amp2")
    assert isinstance(sys.modules["__main__"], types.ModuleType)


def test_files_of_apex_can_be_imported_from_and_name_the_same_things(run: Any) -> None:
    source = (
        "from apex.parallel.LARC import LARC\nfrom apex.normalization.fused_layer_norm import FusedLayerNorm\n"
        "from apex.fp16_utils.fp16_optimizer import FP16_Optimizer\nfrom apex.amp._amp_state import _amp_state\n"
        "from apex.multi_tensor_apply.multi_tensor_apply import MultiTensorApply\nimport apex.parallel.distributed\n"
        "import apex.optimizers.fused_adam as file\nimport apex\nfrom apex.optimizers import FusedAdam\n"
        "same = [apex.parallel.LARC is LARC, apex.normalization.FusedLayerNorm is FusedLayerNorm,\n"
        "    apex.amp._amp_state is _amp_state, file.FusedAdam is FusedAdam]\n"
        "homes = {LARC.__module__, FusedLayerNorm.__module__, FP16_Optimizer.__module__, FusedAdam.__module__}"
    )
    ran = run(source, "bf16-mixed")
    assert all(ran.names["same"])
    assert all(home.startswith("wrapprec.migrate.apex.") for home in ran.names["homes"]), "no second copies"
    assert ran.said[0] == "Apex's amp is not installed: wrapprec.migrate.apex stands in for it"


FIRST_API = """
from apex import amp
early = amp.init(loss_scale=64.0)
net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
optimizer = early.wrap_optimizer(torch.optim.SGD(net.parameters(), lr=0.1))
losses = []
for step in range(6):
    loss = net(torch.ones(4, 6)).square().mean() + 1
    optimizer.zero_grad()
    with optimizer.scale_loss(loss) as scaled_loss:
        scaled_loss.backward()
    optimizer.step()
    losses.append(loss.item())
early._deactivate()
"""


def test_first_api_of_apex_has_its_own_precision_under_run_and_is_in_the_summary(run: Any) -> None:
    ran = run("import torch\nfrom torch import nn\ntorch.manual_seed(0)\n" + FIRST_API, "bf16-mixed")
    plan = wrapprec.handle_of(ran.names["net"])
    assert plan is not None and "compute=float16" in str(plan.policy) and plan.scale == 64.0
    assert ran.said[0] == "Apex's amp is not installed: wrapprec.migrate.apex stands in for it"
    names: dict[str, Any] = {}
    plain = FIRST_API.replace("early.wrap_optimizer(", "(").replace("optimizer.scale_loss(loss)", "nullcontext(loss)")
    plain = plain.replace("from apex import amp\nearly = amp.init(loss_scale=64.0)\n", "").replace("early._de", "#")
    exec(
        "import torch\nfrom contextlib import nullcontext\nfrom torch import nn\ntorch.manual_seed(0)\n" + plain, names
    )
    # float16 keeps 11 bits, in two products and their gradients.
    assert ran.names["losses"] == pytest.approx(names["losses"], rel=1e-3) and len(names["losses"]) == 6


def test_script_with_float32_copies_of_apex_is_left_alone_with_the_reason_and_trains(run: Any) -> None:
    source = (
        "import torch\nfrom torch import nn\nfrom apex.optimizers import FP16_Optimizer, FusedAdam\n"
        "torch.manual_seed(0)\nnet = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).half()\n"
        "adam = FusedAdam(net.parameters(), lr=0.05, bias_correction=False, max_grad_norm=1.0)\n"
        "optimizer = FP16_Optimizer(adam, dynamic_loss_scale=True)\nlosses = []\n"
        "for step in range(8):\n    loss = (net(torch.ones(4, 6).half()) - 1).float().square().mean()\n"
        "    optimizer.backward(loss)\n    optimizer.step()\n    optimizer.zero_grad()\n"
        "    losses.append(loss.item())\n"
    )
    ran = run(source, "bf16-mixed")
    assert ran.names["losses"][-1] < 0.2 * ran.names["losses"][0]
    assert any(line.startswith("left Sequential") and "its parameters are float16" in line for line in ran.said)
    assert wrapprec.handle_of(ran.names["net"]) is None


# Models that are stepped by hand

BY_HAND = """
for x, y in batches(12):
    model.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-0.5)
    losses.append(loss.item())
"""


def test_model_that_is_stepped_by_hand_is_wrapped_at_its_third_forward(run: Any) -> None:
    source = "model = Net()" + BY_HAND
    ran, want = run(source, "bf16-mixed"), _curve(source)
    assert ran.labels == ["Net (58 parameters)"] and ran.names["losses"][:2] == want[:2]
    assert ran.names["losses"][2] != want[2]
    # As for the scripts above.
    assert torch.tensor(ran.names["losses"]).sub(torch.tensor(want)).abs().max() <= 4 * 2**-8 * max(want)
    assert all(param._backward_hooks is None for param in ran.names["model"].parameters())


@pytest.mark.parametrize(
    ("policy", "reason"), [("16-mixed", "nothing could skip a step"), ("bf16-true", "nothing could round its weights")]
)
def test_model_that_is_stepped_by_hand_is_left_alone_where_its_step_needs_a_guard(
    run: Any, policy: str, reason: str
) -> None:
    source = "model = Net()" + BY_HAND
    ran = run(source, policy)
    assert ran.names["losses"] == _curve(source)
    [line] = ran.said
    assert line.startswith("left Net (58 parameters) alone, because the script steps it without") and reason in line


@pytest.mark.parametrize(
    "body",
    [
        "    model(x)",  # no backward
        "    model(x).sum().backward()",  # no step: gradients are looked at
        "    with torch.no_grad():\n        model(x)\n        for p in model.parameters(): p.mul_(0.9)",
        "    model.eval()\n    model(x).sum().backward()\n    for p in model.parameters(): p.data.mul_(0.9)",
    ],
)
def test_model_that_no_training_steps_is_not_taken_for_one(run: Any, body: str) -> None:
    ran = run(f"model = Net()\nfor x, y in batches(8):\n{body}\n", "bf16-mixed")
    assert ran.labels == [] and "nothing was wrapped" in ran.session.summary()


@pytest.mark.parametrize("where", ["torch.device('meta')", "FakeTensorMode()"])
def test_models_without_values_are_not_taken_for_one(run: Any, where: str) -> None:
    source = "from torch._subclasses.fake_tensor import FakeTensorMode\n"
    source += f"with {where}:\n    model = Net()\n    for _ in range(4): model(torch.ones(1, 4)).sum().backward()\n"
    assert run(source, "bf16-mixed").labels == []


def test_steps_by_hand_are_seen_where_a_device_has_no_float64(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.Tensor.sum

    def narrow(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return total(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "sum", narrow)
    assert run("model = Net()" + BY_HAND, "bf16-mixed").labels == ["Net (58 parameters)"]


def test_watch_for_steps_by_hand_ends_at_the_first_optimizer(run: Any) -> None:
    source = "other = Net()\n" + SCRIPTS["plain"][0] + BY_HAND.replace("model", "other")
    assert run(source, "bf16-mixed").labels == ["Net (58 parameters, SGD)"]


# Whole models in files


@pytest.mark.parametrize(
    "save",
    [
        "torch.save(both, 'PATH')",
        "import pickle\nwith open('PATH', 'wb') as f: pickle.dump(both, f)",
        "import pickle\nwith open('PATH', 'wb') as f: f.write(pickle.dumps(both))",
    ],
)
def test_whole_model_is_saved_without_wrapprec(run: Any, tmp_path: Path, save: str) -> None:
    path = tmp_path / "model.pt"
    source = SCRIPTS["plain"][0] + "\nimport copy\nboth = [model, copy.deepcopy(model), nn.DataParallel(model)]\n"
    ran = run(source + save.replace("PATH", str(path)), "16-mixed,init_scale=64")
    loaded = torch.load(path, weights_only=False) if save.startswith("torch") else pickle.loads(path.read_bytes())
    assert b"wrapprec" not in b"".join(_members(path))
    model, x = ran.names["model"], torch.ones(1, 4)
    plain = ran.names["Net"]()
    plain.load_state_dict(model.state_dict())
    for one in loaded:
        assert wrapprec.handle_of(one) is None and torch.equal(one(x), plain(x))
    # In this process everything is as before, also after a copy.
    assert wrapprec.handle_of(model) is not None and not torch.equal(model(x), plain(x))
    assert not torch.equal(pickle.loads(pickle.dumps(model))(x), plain(x))


def _members(path: Path) -> list[bytes]:
    if not zipfile.is_zipfile(path):
        return [path.read_bytes()]
    with zipfile.ZipFile(path) as file:
        return [file.read(name) for name in file.namelist()]


SLOW = """
import io, pickle, threading, time
class Slow:
    def __init__(self, begun=None, go=None): self.begun, self.go = begun, go
    def __reduce__(self):
        self.begun.set(); assert self.go.wait(20); return Slow, ()
def save(slow):
    file = io.BytesIO()
    torch.save([slow, model], file)
    files.append(file.getvalue())
files, events = [], [threading.Event() for _ in range(4)]
threads = []
for begun, go in (events[:2], events[2:]):
    threads.append(threading.Thread(target=save, args=(Slow(begun, go),)))
    threads[-1].start()
    assert begun.wait(20)
for go, thread in zip(events[1::2], threads):
    go.set()
    thread.join()
"""


def test_threads_that_save_at_once_leave_wrapprec_out_and_torch_as_it_was(run: Any) -> None:
    # The second begins within the first, and ends after it. The fixture looks at torch.
    files = run(SCRIPTS["plain"][0] + SLOW, "bf16-mixed").names["files"]
    assert len(files) == 2 and not any(b"wrapprec" in file for file in files)


def test_functions_that_are_replaced_can_be_sent_to_processes_as_alone(run: Any) -> None:
    source = (
        "import pickle\nnames = [torch.save, torch.serialization.save, pickle.dump, pickle.dumps, torch.jit.trace]\n"
    )
    source += (
        "same = [pickle.loads(pickle.dumps(one)) is one for one in names] + [torch.save is torch.serialization.save]"
    )
    assert all(run(source, "bf16-mixed").names["same"])


def test_forward_that_the_script_had_replaced_itself_is_saved_as_it_was(run: Any, tmp_path: Path) -> None:
    source = "model = Net()\nmodel.encoder.forward = model.encoder.forward\n"
    source += "optimizer = torch.optim.SGD(model.parameters(), lr=0.5)" + LOOP
    ran = run(source + f"torch.save(model, {str(tmp_path / 'm.pt')!r})", "bf16-mixed")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)
    assert loaded.encoder.forward.__self__ is loaded.encoder
    assert torch.equal(loaded.encoder.weight, ran.names["model"].encoder.weight)


def test_model_whose_weights_are_low_precision_is_saved_as_it_is(run: Any, tmp_path: Path) -> None:
    source = SCRIPTS["plain"][0].replace("model(x)", "model(x).float()")  # torch 2.9 has no loss of mixed dtypes
    ran = run(source + f"\ntorch.save(model, {str(tmp_path / 'm.pt')!r})", "bf16-true")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)
    assert torch.equal(loaded(torch.ones(1, 4)), ran.names["model"](torch.ones(1, 4)))
    assert loaded.encoder.weight.dtype is torch.bfloat16


# What the script does to its models


GROWS = """
model.extra = nn.Linear(2, 2)
inner = model.forward
model.forward = lambda x: model.extra(inner(x))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""


@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed,init_scale=64"])
def test_script_that_gives_its_model_another_forward_half_way_trains_on(run: Any, policy: str) -> None:
    source = SCRIPTS["plain"][0] + GROWS + LOOP
    ran, want = run(source, policy), _curve(source)
    assert torch.tensor(ran.names["losses"]).sub(torch.tensor(want)).abs().max() <= 4 * 2**-8 * max(want)


def test_model_whose_second_optimizer_is_refused_goes_on_in_float32(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SCRIPTS["another optimizer half way"][0]
    attach, calls = wrapprec.Handle.attach, []

    def second(handle: Any, optimizer: Any, *rest: Any, **more: Any) -> None:
        calls.append(optimizer)
        if len(calls) > 1:
            raise ValueError("Expected less.\nReceived: too much")
        attach(handle, optimizer, *rest, **more)

    monkeypatch.setattr(wrapprec.Handle, "attach", second)
    ran = run(source, "16-mixed,init_scale=64")
    assert len(calls) == 2 and wrapprec.handle_of(ran.names["model"]) is None
    assert any("alone from now on, because wrapprec refuses its Adam: too much" in line for line in ran.said)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_torchscript_model_is_left_alone(run: Any) -> None:
    source = "model = torch.jit.trace(Net(), torch.ones(8, 4))\n"
    source += "optimizer = torch.optim.SGD(model.parameters(), lr=0.5)" + LOOP
    ran = run(source, "bf16-mixed")
    assert ran.names["losses"] == _curve(source)
    [line] = ran.said
    assert line.endswith("alone, because it is compiled by torch.jit, and runs without Python")
