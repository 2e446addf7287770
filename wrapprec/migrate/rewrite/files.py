"""Files for the rewriter: which ones there are, what is in them, and writing without ever leaving half a file."""

from __future__ import annotations

import contextlib
import difflib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wrapprec.errors import WrapprecError, message
from wrapprec.migrate.rewrite.notebook import NotANotebookError, rewrite_notebook
from wrapprec.migrate.rewrite.source import Result, rewrite
from wrapprec.migrate.rewrite.syntax import cst
from wrapprec.migrate.rewrite.trainers import Elsewhere, Trainer, read_trainers

KINDS = (".py", ".ipynb")
_SKIPPED = {"__pycache__", "node_modules", "site-packages", "build", "dist"}


class SourceError(WrapprecError, ValueError):
    """A file or folder that the rewriter cannot take."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file; nothing is written yet.

    Args:
        path: as it was given or found.
        before: its bytes.
        after: its bytes as rewritten.
        result: what there is to say.
        encoding: of both.
    """

    path: Path
    before: bytes
    after: bytes
    result: Result
    encoding: str

    def diff(self) -> str:
        """The change as a unified diff, the empty text where there is none."""
        one, other = (data.decode(self.encoding).split("\n") for data in (self.before, self.after))
        name = self.path.as_posix()
        source, target = (name, name) if self.path.is_absolute() else (f"a/{name}", f"b/{name}")
        found = difflib.unified_diff(_ended(one), _ended(other), source, target)
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in found)


def _ended(parts: Sequence[str]) -> list[str]:
    """Lines with their ends; only line feeds end lines, so that others are shown as they are."""
    return [*(f"{part}\n" for part in parts[:-1]), *([parts[-1]] if parts[-1] else [])]


def collect(paths: Sequence[Path], writing: bool) -> list[Path]:
    """Find the files that paths mean.

    Args:
        paths: files and folders.
        writing: whether they are to be written.

    Raises:
        SourceError: one cannot be taken.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise _error("a file or folder", "no such file" if not path.is_symlink() else "a broken link", path)
        here = sorted(_below(path)) if path.is_dir() else [path]
        if not here:
            raise _error("a folder with .py or .ipynb files", "a folder without any", path)
        tree = (path if path.is_dir() else path.parent).resolve()
        for one in here:
            _check(one, tree, writing)
            found.setdefault(one.resolve(), one)
    return list(found.values())


def _below(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".") and one not in _SKIPPED]
        folders[:] = [one for one in folders if not (Path(where) / one / "pyvenv.cfg").exists()]
        yield from (Path(where) / name for name in names if name.endswith(KINDS))


def _check(path: Path, tree: Path, writing: bool) -> None:
    if path.suffix not in KINDS:
        raise _error("a .py or .ipynb file", f"a file called {path.name}", path)
    if not path.exists():
        raise _error("a file", "a broken link", path)
    if not path.resolve().is_relative_to(tree):
        raise _error(f"a file below {tree}", f"a link to {path.resolve()}", path, "name the file that it leads to")
    if not path.is_file():
        raise _error("a regular file", "something else of that name", path)
    mode = path.resolve().stat().st_mode
    if writing and (not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(path, os.W_OK)):
        raise _error("a file that may be written", "a read-only file", path, "change its mode, or leave --write out")


def _error(expected: str, received: str, path: Path, remedy: str = "name files that are there") -> SourceError:
    return SourceError(message(expected, received, where=str(path), remedy=f"{remedy}; nothing was written"))


def look_all(paths: Sequence[Path], policy: str) -> list[Outcome]:
    """Read files and rewrite what is in them, in memory; a loop whose callers wrap what it trains has nothing to say.

    Args:
        paths: of them.
        policy: for loops that had no mixed precision.

    Raises:
        SourceError: one cannot be read or parsed.
    """
    resolved = [path.resolve() for path in paths]
    trainers = [one for path in paths if len(paths) > 1 for one in _trainers(path)]
    outcomes = [look(path, policy, Elsewhere(trainers, resolved, path.resolve())) for path in paths]
    trains = [one for outcome in outcomes for one in outcome.result.trains]
    spoken = {trainer for trainer, is_served in trains if is_served}
    spoken -= {trainer for trainer, is_served in trains if not is_served}
    quiet = {(trainer.path, trainer.line) for trainer in spoken}
    for number, (path, outcome) in enumerate(zip(resolved, outcomes, strict=True)):
        left = tuple(one for one in outcome.result.left if (path, one.line) not in quiet)
        outcomes[number] = replace(outcome, result=replace(outcome.result, left=left))
    return outcomes


def _trainers(path: Path) -> list[Trainer]:
    if path.suffix != ".py":
        return []
    try:
        data = path.read_bytes()
        return read_trainers(path, cst.parse_module(data)) if b".backward(" in data else []
    except Exception:  # `look` says what is wrong with it
        return []


def look(path: Path, policy: str, elsewhere: Elsewhere | None = None) -> Outcome:
    """Read a file and rewrite what is in it, in memory.

    Args:
        path: of it.
        policy: for loops that had no mixed precision.
        elsewhere: the trainers of the other files that are given.

    Raises:
        SourceError: it cannot be read or parsed.
    """
    try:
        before = path.read_bytes()
    except OSError as error:
        raise _error("a file that can be read", f"{type(error).__name__}: {error.strerror}", path) from error
    try:
        if path.suffix == ".ipynb":
            text = before.decode("utf-8")
            document, result = rewrite_notebook(text, policy)
            return Outcome(path, before, document.encode("utf-8"), result, "utf-8")
        module = cst.parse_module(before)
        if module.bytes != before:
            raise _error(
                "a source that can be written back byte for byte", "one that cannot", path, "mend its line ends"
            )
        result = rewrite(module, policy, elsewhere)
        after = result.module.bytes if result.changed else before
        return Outcome(path, before, after, result, module.encoding)
    except NotANotebookError as error:
        raise _error("a Jupyter notebook", str(error), path, "save it as format 4") from error
    except cst.ParserSyntaxError as error:
        where = f"a syntax error in line {error.raw_line}"
        raise _error("Python source", where, path, "mend it first (Python 2 needs a conversion)") from error
    except (cst.CSTValidationError, TypeError, AssertionError, LookupError) as error:
        remedy = "this is a defect of the rewriter: please report the file"
        raise _error("a file that can be rewritten", f"{type(error).__name__}: {error}", path, remedy) from error
    except (SyntaxError, UnicodeError) as error:
        remedy = "save it as UTF-8, or declare its encoding in the first line"
        raise _error(
            "text in UTF-8 or in the encoding that its first lines declare", f"{error}", path, remedy
        ) from error
    except RecursionError as error:
        raise _error("source that is nested less deeply", "RecursionError", path, "shorten its expressions") from error


def write(outcome: Outcome) -> None:
    """Write a file all at once: what was there stays until the new one is complete.

    Args:
        outcome: of `look`.

    Raises:
        SourceError: it was changed in the meantime, or cannot be written.
    """
    path = outcome.path.resolve()  # a link stays a link
    draft: str | None = None
    try:
        if path.read_bytes() != outcome.before:
            raise _error("the file as it was read", "one that was changed since", path, "run again")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            draft = file.name
            file.write(outcome.after)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, stat.S_IMODE(path.stat().st_mode))
        os.replace(draft, path)
    except OSError as error:
        raise _error("a file that may be written", f"{type(error).__name__}: {error.strerror}", path) from error
    finally:
        if draft is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
