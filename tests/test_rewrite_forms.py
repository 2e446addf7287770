"""The same script in other words: names, comments, layout, and the many ways to say one thing."""

from __future__ import annotations

import re
import textwrap

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rewriting import LEGACY, becomes, rewritten

SOURCES = {name: (LEGACY / f"{name}.py").read_text("utf-8") for name in ("references", "dcgan", "trainer", "halves")}
NAMES = {
    "references": ["model", "optimizer", "scaler", "criterion", "output", "checkpoint"],
    "dcgan": ["netD", "netG", "optimizerD", "optimizerG", "scaler", "errD", "fake"],
    "trainer": ["trainer", "loss", "x"],
    "halves": ["master_params", "optimizer", "SCALE", "param", "master"],
}


def _renamed(source: str, names: dict[str, str]) -> str:
    return re.sub(r"\w+", lambda found: names.get(found.group(), found.group()), source)


def _noisy(source: str, noise: list[int], kinds: list[str]) -> str:
    """Comments and blank lines between lines; strings and brackets over several lines are left whole."""
    lines, depth = [], 0
    for number, line in enumerate(source.split("\n")):
        kind = kinds[noise[number % len(noise)] % len(kinds)]
        indent = re.match(r"\s*", line)
        opens_block = bool(line.strip()) and not line.lstrip().startswith(("else", "elif", "except", "#", '"""', "@"))
        if depth == 0 and opens_block and kind and indent:
            lines.append("" if kind == "blank" else f"{indent.group()}# noise {number}")
        depth += sum(line.count(one) for one in "([{") - sum(line.count(one) for one in ")]}")
        if kind == "end" and depth == 0 and line.strip() and "#" not in line and '"""' not in line:
            line += f"  # said {number}"
        lines.append(line)
    return "\n".join(lines)


def _bare(source: str) -> str:
    """Without comments and blank lines."""
    lines = [re.sub(r"\s*# (noise|said) \d+$", "", line).rstrip() for line in source.split("\n")]
    return "\n".join(line for line in lines if line)


# Without shrinking: an example takes half a second, and shrinking would take minutes.
@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(
    name=st.sampled_from(sorted(SOURCES)),
    noise=st.lists(st.integers(0, 100), min_size=1, max_size=30),
    suffix=st.sampled_from(["", "_1", "X", "ng"]),
)
def test_noise_and_other_names_do_not_change_what_is_rewritten(name: str, noise: list[int], suffix: str) -> None:
    names = {one: one + suffix for one in NAMES[name]}
    clean, result = rewritten(SOURCES[name])
    noisy, other = rewritten(_renamed(_noisy(SOURCES[name], noise, ["", "blank", "comment", "end"]), names))
    assert _bare(noisy) == _bare(_renamed(clean, names))
    assert len(other.left) == len(result.left) == 0


SCRIPT = """
import torch
{imports}

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = {scaler}
{context}
for x in loader:
    with {cast}:
        loss = model(x).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
"""


@pytest.mark.parametrize(
    ("imports", "scaler", "context", "cast", "arguments"),
    [
        ("", "torch.cuda.amp.GradScaler()", "", "torch.cuda.amp.autocast()", '"16-mixed"'),
        ("import torch.cuda.amp", "torch.cuda.amp.GradScaler()", "", "torch.cuda.amp.autocast()", '"16-mixed"'),
        ("from torch import amp", "amp.GradScaler()", "", "amp.autocast('cuda')", '"16-mixed"'),
        ("from torch.cuda import amp as A", "A.GradScaler()", "", "A.autocast()", '"16-mixed"'),
        ("", "torch.amp.GradScaler('cuda')", "", "torch.autocast('cuda', torch.half)", '"16-mixed"'),
        ("", "torch.amp.GradScaler()", "", "torch.autocast('cuda', dtype=torch.bfloat16)", '"bf16-mixed"'),
        ("", "torch.amp.GradScaler()", "", "torch.autocast('cpu')", '"bf16-mixed"'),
        ("", "torch.amp.GradScaler()", "d = 'cuda'", "torch.autocast(d)", "torch.get_autocast_dtype('cuda')"),
        ("", "torch.amp.GradScaler()", "d = ask()", "torch.autocast(d)", None),
        ("d = 'cuda'", "torch.amp.GradScaler()", "", "torch.autocast(d)", "torch.get_autocast_dtype(d)"),
        ("d = 'cuda'", "torch.amp.GradScaler()", "c = torch.autocast(d)", "c", "torch.get_autocast_dtype(d)"),
        ("t = torch.half", "torch.amp.GradScaler()", "", "torch.autocast('cuda', t)", "t"),
        (
            "on = 1 > 0",
            "torch.amp.GradScaler(enabled=on)",
            "",
            "torch.autocast('cuda', enabled=on)",
            '"16-mixed", enabled=on',
        ),
        (
            "import contextlib\non = 1 > 0",
            "torch.cuda.amp.GradScaler(enabled=on)",
            "",
            "torch.cuda.amp.autocast() if on else contextlib.nullcontext()",
            '"16-mixed", enabled=on',
        ),
        (
            "off = 1 > 0",
            "torch.cuda.amp.GradScaler(enabled=not off)",
            "",
            "torch.cuda.amp.autocast(not off)",
            '"16-mixed", enabled=not off',
        ),
        (
            "on = 1 > 0",
            "torch.cuda.amp.GradScaler(enabled=on)",
            "",
            "torch.cuda.amp.autocast()",
            '"16-mixed", loss_scale="dynamic" if on else "none"',
        ),
        (
            "",
            "torch.cuda.amp.GradScaler(enabled=False)",
            "",
            "torch.cuda.amp.autocast()",
            '"16-mixed", loss_scale="none"',
        ),
        (
            "",
            "torch.cuda.amp.GradScaler(512.0, growth_interval=10)",
            "",
            "torch.cuda.amp.autocast()",
            '"16-mixed", loss_scale=wrapprec.LossScale(init_scale=512.0, growth_interval=10)',
        ),
        (
            "t = torch.half",
            "torch.amp.GradScaler(enabled=(t == torch.float16))",
            "",
            "torch.autocast('cuda', dtype=t)",
            "t",
        ),
    ],
)
def test_every_way_to_say_it_gives_the_same_loop(
    imports: str, scaler: str, context: str, cast: str, arguments: str | None
) -> None:
    code, result = rewritten(SCRIPT.format(imports=imports, scaler=scaler, context=context, cast=cast))
    if arguments is None:  # the device is set after the place where `wrap` goes
        assert not result.changed and "is not known where the model is wrapped" in result.left[0].words
        return
    assert not result.left
    flat = re.sub(r",\n\)", ")", re.sub(r"\(\n\s*", "(", re.sub(r",\n\s+", ", ", code)))
    assert f"wrapprec.wrap(model, optimizer, {arguments})\n" in flat
    assert code.rstrip().endswith("    loss = model(x).sum()\n    loss.backward()\n    optimizer.step()")
    assert "amp" not in code and "contextlib" not in code and code.startswith("\nimport torch\n")


def test_mistakes_are_spoken_of() -> None:
    result = becomes(
        """
        import torch
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        scaler = torch.amp.GradScaler("cuda")
        for x in loader:
            with torch.autocast("cuda"):
                loss = model(x).sum()
            scaler.scale(loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scheduler.step()
            scaler.step(optimizer)
            scaler.update()
        """,
        """
        import torch
        import wrapprec
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        wrapprec.wrap(model, optimizer, "16-mixed")
        for x in loader:
            loss = model(x).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scheduler.step()
            optimizer.step()
        """,
    )
    assert [note.line for note in result.notes] == [10, 11]
    assert "clipped scaled gradients" in result.notes[0].words and "steps before" in result.notes[1].words


def test_a_handle_is_found_where_the_scaler_was_made_in_another_function_than_the_model() -> None:
    becomes(
        """
        import torch

        def train(model, optimizer, loader):
            scaler = torch.amp.GradScaler("cuda")
            for x in loader:
                with torch.autocast("cuda"):
                    loss = model(x).sum()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            return scaler.state_dict()

        def main():
            model = torch.nn.Linear(4, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for epoch in range(3):
                train(model, optimizer, [])
        """,
        """
        import torch
        import wrapprec

        def train(model, optimizer, loader):
            handle = wrapprec.handle_of(model)
            for x in loader:
                loss = model(x).sum()
                loss.backward()
                optimizer.step()
            return handle.state_dict()

        def main():
            model = torch.nn.Linear(4, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            wrapprec.wrap(model, optimizer, "16-mixed")
            for epoch in range(3):
                train(model, optimizer, [])
        """,
    )


def test_names_that_are_taken_are_not_taken_again() -> None:
    code, _ = rewritten(
        textwrap.dedent(
            """
            import torch
            import wrapprec_tools as handle
            model = torch.nn.Linear(4, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler("cuda")
            with torch.autocast("cuda"):
                loss = model(x).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            handle.save(scaler.state_dict())
            """
        )
    )
    assert "precision_handle = wrapprec.wrap(" in code and "handle.save(precision_handle.state_dict())" in code


def test_inference_alone_is_wrapped_without_an_optimizer() -> None:
    becomes(
        """
        import torch

        model = torch.nn.Linear(4, 1)
        model.eval()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            y = model(x)
        """,
        """
        import torch
        import wrapprec

        model = torch.nn.Linear(4, 1)
        wrapprec.wrap(model, policy="bf16-mixed")
        model.eval()
        with torch.no_grad():
            y = model(x)
        """,
    )
