"""`python -m wrapprec migrate` on files: what is printed, what is written, and everything that is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rewriting import LEGACY

from wrapprec.cli import main
from wrapprec.migrate.rewrite import files, source

BEFORE = (LEGACY / "clipwrong.py").read_bytes()
AFTER = (LEGACY / "migrated" / "clipwrong.py").read_bytes()


def _migrate(*arguments: object) -> int:
    return main(["migrate", *map(str, arguments)])


def test_the_difference_is_printed_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "script.py"
    file.write_bytes(BEFORE)
    assert _migrate(file) == 0
    assert file.read_bytes() == BEFORE
    shown = capsys.readouterr().out
    assert shown.startswith(f"--- {file}\n+++ {file}\n@@") and '+wrapprec.wrap(model, optimizer, "16-mixed")\n' in shown


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_the_difference_can_be_applied(
    tmp_path: Path, newline: bytes, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    file = tmp_path / "script.py"
    file.write_bytes(BEFORE.replace(b"\n", newline).rstrip())
    assert _migrate(file) == 0
    difference = capfdbinary.readouterr().out
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shown = difference.replace(f"--- {file}".encode(), b"--- a/script.py").replace(
        f"+++ {file}".encode(), b"+++ b/script.py"
    )
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=shown, check=True)
    assert file.read_bytes() == AFTER.replace(b"\n", newline).rstrip()


def test_write_edits_in_place_keeps_the_mode_and_leaves_no_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "script.py"
    file.write_bytes(BEFORE)
    file.chmod(0o755)
    assert _migrate("--write", tmp_path) == 0
    assert file.read_bytes() == AFTER and file.stat().st_mode & 0o777 == 0o755
    assert [one.name for one in tmp_path.iterdir()] == ["script.py"]
    assert "rewritten" in capsys.readouterr().err
    assert _migrate("--check", file) == 0, "nothing is left to do"


def test_check_says_whether_anything_is_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "script.py"
    file.write_bytes(BEFORE)
    assert _migrate("--check", file) == 1 and file.read_bytes() == BEFORE
    file.write_bytes(BEFORE + b"scaler.odd()\n")
    assert _migrate("--check", "--write", file) == 1 and file.read_bytes() == BEFORE + b"scaler.odd()\n"
    assert f"{file}:23: left: `scaler.odd` has no counterpart" in capsys.readouterr().err
    file.write_bytes(b"print('hello')\n")
    assert _migrate("--check", file) == 0


@pytest.mark.parametrize(
    "form",
    ["\ufeff{}", "# -*- coding: latin-1 -*-\n{}# \xe9\n", "{}\x0c\n# \u4e2d\n"],
    ids=["mark", "latin", "form feed"],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("indent", ["    ", "\t", "  "])
def test_encoding_line_ends_and_indentation_stay(tmp_path: Path, form: str, newline: str, indent: str) -> None:
    encoding = "latin-1" if "latin" in form else "utf-8"
    file = tmp_path / "script.py"

    def dressed(source: bytes) -> bytes:
        text = form.format("{}").replace("{}", source.decode().replace("    ", indent))
        return text.replace("\n", newline).encode(encoding)

    file.write_bytes(dressed(BEFORE))
    assert _migrate("--write", file) == 0
    assert file.read_bytes() == dressed(AFTER)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.py", b"x = (\n", "a syntax error in line"),
        ("a.py", b"print 'python 2'\n", "a syntax error in line 1"),
        ("a.py", b"# \xe9\n", "Expected text in UTF-8"),
        ("a.py", b"# coding: nonsense\nx = 1\n", "Expected text in UTF-8"),
        ("a.py", b"# coding: utf-8\nx = '\xe9'\n", "Expected text in UTF-8"),
        ("a.txt", b"x = 1\n", "Expected a .py or .ipynb file"),
        ("a.ipynb", b"{}", "Expected a Jupyter notebook"),
        ("a.ipynb", b"\xe9", "Expected text in UTF-8"),
        ("a.ipynb", b'{"cells": [{"cell_type": "code", "source": "x = ("}]}', "a syntax error in line"),
    ],
)
def test_a_file_that_cannot_be_taken_stops_all_before_anything_is_written(
    tmp_path: Path, name: str, content: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.py", tmp_path / name
    good.write_bytes(BEFORE)
    bad.write_bytes(content)
    assert _migrate("--write", good, bad) == 2
    said = capsys.readouterr()
    assert reason in said.err and str(bad) in said.err and "Remedy: " in said.err and said.out == ""
    assert good.read_bytes() == BEFORE and bad.read_bytes() == content


def test_missing_files_and_empty_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _migrate(tmp_path / "none.py") == 2 and "no such file" in capsys.readouterr().err
    assert _migrate(tmp_path) == 2 and "a folder without any" in capsys.readouterr().err


def test_a_read_only_file_is_refused_for_writing_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "script.py"
    file.write_bytes(BEFORE)
    file.chmod(0o444)
    assert _migrate(file) == 0
    assert _migrate("--write", file) == 2 and "a read-only file" in capsys.readouterr().err
    assert file.read_bytes() == BEFORE


def test_a_link_out_of_the_tree_is_refused_and_one_inside_stays_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside, tree = tmp_path / "outside.py", tmp_path / "tree"
    outside.write_bytes(BEFORE)
    tree.mkdir()
    (tree / "real.py").write_bytes(BEFORE)
    (tree / "inner.py").symlink_to("real.py")
    assert _migrate("--write", tree) == 0
    assert (tree / "inner.py").is_symlink() and (tree / "real.py").read_bytes() == AFTER
    (tree / "out.py").symlink_to(outside)
    assert _migrate("--write", tree) == 2 and "a link to" in capsys.readouterr().err
    assert outside.read_bytes() == BEFORE
    (tree / "out.py").unlink()
    (tree / "broken.py").symlink_to("nowhere.py")
    assert _migrate(tree) == 2 and "a broken link" in capsys.readouterr().err


def test_folders_of_tools_are_not_entered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (".git", ".ipynb_checkpoints", "__pycache__", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = (\n")
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "pyvenv.cfg").touch()
    (tmp_path / "env" / "a.py").write_text("x = (\n")
    (tmp_path / "mine.py").write_bytes(BEFORE)
    assert _migrate(tmp_path) == 0 and "mine.py" in capsys.readouterr().out


def test_a_failure_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "script.py"
    file.write_bytes(BEFORE)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert _migrate("--write", file) == 2 and "No space left" in capsys.readouterr().err
    assert file.read_bytes() == BEFORE and [one.name for one in tmp_path.iterdir()] == ["script.py"]


def test_a_file_that_changed_in_the_meantime_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_bytes(BEFORE)
    outcome = files.look(file, "auto")
    file.write_bytes(b"mine = 1\n")
    with pytest.raises(files.SourceError, match="changed since"):
        files.write(outcome)
    assert file.read_bytes() == b"mine = 1\n"


def test_the_script_is_never_run_and_the_policy_is_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plain.py"
    file.write_bytes(b"raise SystemExit('ran')\n" + (LEGACY / "plain.py").read_bytes())
    assert _migrate(file, "--policy", "bf16-module") == 0
    assert '+wrapprec.wrap(model, optimizer, "bf16-module")' in capsys.readouterr().out
    assert _migrate(file, "--policy", "floaty") == 2


def test_without_libcst_the_error_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(BEFORE)
    code = (
        "import sys; sys.modules['libcst'] = None\n"
        f"from wrapprec.cli import main; sys.exit(main(['migrate', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'wrapprec[migrate]'" in done.stderr and "Traceback" not in done.stderr


def test_the_command_line_knows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "migrate" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["nonsense"])
    assert stopped.value.code == 2


def test_a_file_without_a_word_of_training_is_passed_without_a_look_at_its_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Finding out what names stand for takes most of the time, and most files of a project do not train."""
    path = tmp_path / "data.py"
    path.write_text("import torch\n\ndef load(path):\n    return torch.load(path)\n")

    def refuse(module: object) -> None:
        raise AssertionError("names were looked up")

    monkeypatch.setattr(source, "Names", refuse)
    outcome = files.look(path, "auto")
    assert outcome.after == outcome.before and not outcome.result.left
    path.write_text("import torch\nloss.backward()\n")
    with pytest.raises(files.SourceError, match="names were looked up"):
        files.look(path, "auto")
