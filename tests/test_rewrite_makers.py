"""What makes an autocast at each `with` goes: partials, lambdas, methods; so do choices by the version of torch."""

from __future__ import annotations

import pytest
from rewriting import becomes, rewritten

LOOP = """
import torch
from contextlib import nullcontext, suppress
from functools import partial

def main(amp, device):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters())
    {maker}
    for x, y in device.loader:
        optimizer.zero_grad()
        with {use}:
            loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
"""
PLAIN = """
import torch
import wrapprec

def main(amp, device):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters())
    wrapprec.wrap(model, optimizer, {settings})
    for x, y in device.loader:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
"""
BF16, FLAGGED = '"bf16-mixed"', '"bf16-mixed", enabled=amp'


def _of_contexts(code: str) -> str:
    """Without the imports that the maker did not use: they are none of the rewriter's business."""
    unused = ("from contextlib import", "from functools import")
    return "\n".join(line for line in code.split("\n") if not line.startswith(unused))


@pytest.mark.parametrize(
    ("maker", "settings"),
    [
        ('ctx = partial(torch.autocast, "cuda", dtype=torch.bfloat16)', BF16),
        ('ctx = partial(torch.autocast, device_type="cuda", dtype=torch.bfloat16, enabled=amp)', FLAGGED),
        ('ctx = partial(torch.autocast, "cuda", torch.bfloat16) if amp else nullcontext', FLAGGED),
        ('ctx = suppress\n    if amp:\n        ctx = partial(torch.autocast, "cpu")', FLAGGED),
        ('if amp:\n        ctx = partial(torch.autocast, "cpu")\n    else:\n        ctx = nullcontext', FLAGGED),
        ('ctx = lambda: torch.autocast("cpu")', BF16),
        ('ctx = (lambda: torch.autocast("cpu")) if amp else nullcontext', FLAGGED),
        ('ctx = lambda: torch.autocast("cpu") if amp else nullcontext()', FLAGGED),
    ],
)
def test_a_maker_of_contexts_goes_and_its_flag_is_kept(maker: str, settings: str) -> None:
    code, result = rewritten(LOOP.format(maker=maker, use="ctx()"))
    assert _of_contexts(code) == PLAIN.format(settings=settings)
    assert not result.left
    assert ("partial" in code) is ("partial" not in maker), "an import goes with its last use, and only then"


@pytest.mark.parametrize(
    ("maker", "use", "line", "words"),
    [
        ('ctx = partial(torch.autocast, "cuda")', "ctx(enabled=amp)", 12, "in another way than by `with`"),
        ('ctx = partial(torch.autocast, "cuda")', "device.enter(ctx())", 12, "in another way than by `with`"),
        ('ctx = lambda on: torch.autocast("cuda", enabled=on)', "ctx(amp)", 9, "in a way that is not known"),
    ],
)
def test_a_maker_that_gets_arguments_or_is_handed_on_stays(maker: str, use: str, line: int, words: str) -> None:
    code, result = rewritten(LOOP.format(maker=maker, use=use))
    assert code == LOOP.format(maker=maker, use=use)
    assert (line, words) in [(one.line, words) for one in result.left if words in one.words]


CLASS = """
import torch
from contextlib import nullcontext

class Trainer:
    def __init__(self, amp):
        self.amp = amp
        self.model = torch.nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp)

{method}
    def step(self, x, y):
        with self.autocast{call}:
            loss = (self.model(x) - y).square().mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
"""
SIMPLE = '    def autocast(self):\n        return torch.autocast("cuda", enabled=self.amp)\n'


@pytest.mark.parametrize(
    ("method", "call"),
    [
        (SIMPLE, "()"),
        (f"    @property\n{SIMPLE}", ""),
        (
            '    def autocast(self):\n        """In half."""\n        if self.amp:\n'
            '            return torch.autocast("cuda")\n        return nullcontext()\n',
            "()",
        ),
        (
            "    def autocast(self):\n        if not self.amp:\n            return nullcontext()\n"
            '        return torch.autocast("cuda")\n',
            "()",
        ),
        (
            '    def autocast(self):\n        if self.amp:\n            return torch.autocast("cuda")\n'
            "        else:\n            return nullcontext()\n",
            "()",
        ),
    ],
)
def test_a_method_that_only_gives_autocast_goes(method: str, call: str) -> None:
    code, result = rewritten(CLASS.format(method=method, call=call))
    assert not result.left
    assert "autocast" not in code and "caler" not in code
    (line,) = [line.strip() for line in code.split("\n") if "wrap(" in line]
    assert line == 'wrapprec.wrap(self.model, self.optimizer, "16-mixed", enabled=amp)'


@pytest.mark.parametrize(
    "method",
    [
        '    def autocast(self):\n        self.count()\n        return torch.autocast("cuda", enabled=self.amp)\n',
        '    def autocast(self):\n        if self.amp:\n            return torch.autocast("cuda")\n'
        "        return self.other()\n",
        f"    @staticmethod\n{SIMPLE}",
    ],
)
def test_a_method_that_does_more_than_give_autocast_stays_with_its_loop(method: str) -> None:
    source = CLASS.format(method=method, call="()")
    code, result = rewritten(source)
    assert code == source and result.left


def test_a_method_that_is_used_from_outside_of_its_class_stays() -> None:
    source = (
        CLASS.format(method=SIMPLE, call="()") + "\ndef look(trainer, x):\n    with trainer.autocast():\n        f(x)\n"
    )
    code, result = rewritten(source)
    assert code == source
    assert any("gives autocast" in one.words for one in result.left)


def test_every_if_around_an_assigned_context_is_a_condition_of_it() -> None:
    """Only the innermost one was taken: this would have trained in bfloat16 without `amp`."""
    becomes(
        """
        import torch
        from contextlib import nullcontext

        def main(amp, bf16, loader):
            model = torch.nn.Linear(4, 2)
            optimizer = torch.optim.SGD(model.parameters())
            ctx = nullcontext()
            if amp:
                if bf16:
                    ctx = torch.autocast("cpu")
            for x in loader:
                with ctx:
                    loss = model(x).sum()
                loss.backward()
                optimizer.step()
        """,
        """
        import torch
        import wrapprec

        def main(amp, bf16, loader):
            model = torch.nn.Linear(4, 2)
            optimizer = torch.optim.SGD(model.parameters())
            wrapprec.wrap(model, optimizer, "bf16-mixed", enabled=bf16 and amp)
            for x in loader:
                loss = model(x).sum()
                loss.backward()
                optimizer.step()
        """,
    )


VERSIONS = """
import torch
{imports}
def main(amp, loader):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters())
{scaler}
    for x in loader:
        with {cast}:
            loss = model(x).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
"""
BY_VERSION = """\
    if hasattr(torch.amp, "GradScaler"):
        scaler = torch.amp.GradScaler("cuda", enabled=amp)
    else:
        scaler = torch.cuda.amp.GradScaler(enabled=amp{more})"""
BY_IMPORT = """
try:
    from torch.amp import GradScaler, autocast
except ImportError:
    from torch.cuda.amp import GradScaler, autocast
"""
MIGRATED = """
import torch
import wrapprec
{gap}def main(amp, loader):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters())
    wrapprec.wrap(model, optimizer, "16-mixed", enabled=amp)
    for x in loader:
        loss = model(x).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


def test_a_scaler_made_by_the_version_of_torch_is_one_scaler() -> None:
    source = VERSIONS.format(
        imports="", scaler=BY_VERSION.format(more=""), cast='torch.amp.autocast("cuda", enabled=amp)'
    )
    code, result = rewritten(source)
    assert code == MIGRATED.format(gap="\n") and not result.left


def test_scalers_that_differ_between_the_sides_of_an_if_stay() -> None:
    source = VERSIONS.format(
        imports="", scaler=BY_VERSION.format(more=", init_scale=8.0"), cast='torch.amp.autocast("cuda", enabled=amp)'
    )
    text, result = rewritten(source)
    assert text == source
    assert [one.line for one in result.left if "more than one scaler" in one.words] == [8, 10]


@pytest.mark.parametrize(
    ("scaler", "cast"),
    [('GradScaler("cuda", {})', 'autocast("cuda", {})'), ("GradScaler({})", "autocast({})")],
)
def test_names_imported_by_try_and_except_are_told_by_their_device(scaler: str, cast: str) -> None:
    """One of the two origins was taken by chance, and `"cuda"` read as `enabled` half of the time."""
    source = VERSIONS.format(
        imports=BY_IMPORT, scaler=f"    scaler = {scaler.format('enabled=amp')}", cast=cast.format("enabled=amp")
    )
    code, result = rewritten(source)
    assert code == MIGRATED.format(gap="\n") and not result.left
