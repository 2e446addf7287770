"""The documents: every link leads somewhere, every Python block runs and prints what stands below it, TOML parses."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from wrapprec import Policy

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def _tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text("utf-8"))


def _fences(path: Path) -> list[tuple[str, str]]:
    return [(token.info.strip(), token.content) for token in _tokens(path) if token.type == "fence"]


def _anchors(path: Path) -> set[str]:
    tokens = _tokens(path)
    titles = [after.content for before, after in itertools.pairwise(tokens) if before.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_document
def test_every_link_leads_somewhere(path: Path) -> None:
    inline = [token for token in _tokens(path) if token.type == "inline"]
    links = [str(child.attrs["href"]) for token in inline for child in token.children or () if "href" in child.attrs]
    for link in links:
        if not re.match(r"\w+:", link):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{link} leads nowhere"
            assert not anchor or anchor in _anchors(target), f"{link} has no such heading"


@every_document
def test_every_python_block_runs_and_prints_the_text_below_it(path: Path) -> None:
    names: dict[str, object] = {"__name__": "document"}
    printed = None
    for kind, text in _fences(path):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, str(path), "exec"), names)
            printed = out.getvalue()
        elif kind == "text" and printed is not None:
            assert text == printed
            printed = None
    assert not printed, "a block prints what the document does not show"


@every_document
def test_every_toml_block_is_a_policy(path: Path) -> None:
    for kind, text in _fences(path):
        if kind == "toml":
            policy = Policy.from_toml(text)
            assert Policy.from_toml(policy.to_toml()) == policy


@every_document
def test_fences_are_of_a_kind_that_is_checked_or_needs_no_check(path: Path) -> None:
    assert {kind for kind, _ in _fences(path)} <= {"python", "text", "toml", "bash", "diff"}


def test_readme_has_two_commands_that_install_what_they_run() -> None:
    commands = [text.strip() for kind, text in _fences(ROOT / "README.md") if kind == "bash"]
    assert len(commands) == 2
    for command in commands:
        install, run = command.split(" && ")
        assert shlex.split(install)[:4] == ["pip", "install", "-c", "constraints.txt"]
        assert all((ROOT / word).exists() for word in shlex.split(run) if word.endswith(".py"))
    assert commands[1] in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


def test_readme_shows_the_loop_of_the_quickstart() -> None:
    shown = next(text for kind, text in _fences(ROOT / "README.md") if kind == "diff")
    source = (ROOT / "examples" / "quickstart.py").read_text("utf-8")
    for line in shown.splitlines()[2:]:
        assert line[1:].strip() in source
