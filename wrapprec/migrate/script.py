"""Runs a script, a module or a folder as the interpreter would: as `__main__`, with its arguments and its path."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from wrapprec.errors import WrapprecError, message

_OURS = str(Path(__file__).parent.parent) + os.sep


@dataclass(frozen=True)
class Program:
    """What is to be run.

    Args:
        target: a path, `-` for what comes on stdin, or a module's name.
        is_module: whether it is a module's name, as after `python -m`.
        arguments: what follows it.
    """

    target: str
    is_module: bool
    arguments: tuple[str, ...]

    def load(self) -> tuple[CodeType, ModuleType]:
        """Read and compile it, and put its arguments and its path where the interpreter would.

        Returns:
            The code, and the module that will be `__main__`.

        Raises:
            WrapprecError: there is no such script or module, or it cannot be read.
            SyntaxError: it does not compile; shown without frames of ours.
        """
        sys.argv[:] = [self.target, *self.arguments]
        main = ModuleType("__main__")
        main.__dict__["__builtins__"] = builtins
        return (self._module(main) if self.is_module else self._script(main)), main

    def _script(self, main: ModuleType) -> CodeType:
        if self.target == "-":
            _set_path("")
            _describe(main, None, "<stdin>", None)
            return _compile(sys.stdin.read().encode(), "<stdin>")
        path = Path(self.target)
        if path.is_dir() or path.suffix in (".zip", ".pyz"):
            _set_path(os.path.abspath(self.target))
            spec = importlib.machinery.PathFinder.find_spec("__main__", [self.target])
            return self._found(main, spec)
        # As of Python 3.9 `__file__` and tracebacks have the full path, and `sys.argv` what was typed.
        full = os.path.abspath(self.target)
        try:
            with io.open_code(full) as file:
                source = file.read()
        except OSError as error:
            raise _missing(f"a script that can be read, {self.target!r}", error) from error
        _set_path(os.path.dirname(os.path.realpath(full)))
        _describe(main, None, full, importlib.machinery.SourceFileLoader("__main__", full))
        return _compile(source, full)

    def _module(self, main: ModuleType) -> CodeType:
        _set_path(os.getcwd())
        try:
            spec = importlib.util.find_spec(self.target)
            if spec is not None and spec.submodule_search_locations is not None:
                spec = importlib.util.find_spec(f"{self.target}.__main__")
        except (ImportError, ValueError) as error:
            raise _missing(f"a module that can be found, {self.target!r}", error) from error
        return self._found(main, spec)

    def _found(self, main: ModuleType, spec: Any) -> CodeType:
        code = None if spec is None or spec.loader is None else spec.loader.get_code(spec.name)
        if code is None:
            raise _missing(f"a module with code to run, {self.target!r}", "none is there")
        sys.argv[0] = spec.origin if self.is_module else self.target
        # Processes that are spawned import a module again by this spec, and a folder's `__main__` not at all.
        _describe(main, spec, spec.origin, spec.loader)
        found: CodeType = code
        return found


def execute(code: CodeType, main: ModuleType) -> None:
    """Run what `Program.load` gave.

    Args:
        code: of the script.
        main: becomes `__main__`.

    Raises:
        BaseException: whatever the script raises; shown without frames of ours.
    """
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
    except BaseException:
        # Now, not before: the script may have put a hook of its own there.
        _show_without_ours()
        raise


def _set_path(first: str) -> None:
    """Put in the first place what the interpreter would have put there, in place of what it put there for us."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = first


def _describe(main: ModuleType, spec: Any, file: str, loader: Any) -> None:
    main.__spec__, main.__loader__, main.__file__, main.__annotations__ = spec, loader, file, {}
    main.__package__ = None if spec is None else spec.parent
    main.__dict__["__cached__"] = None if spec is None else spec.cached


def _compile(source: bytes, name: str) -> CodeType:
    try:
        return compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        _show_without_ours()
        raise


def _missing(expected: str, received: object) -> WrapprecError:
    remedy = "write it as after `python`: a path, or -m and a module's name"
    return WrapprecError(message(expected, str(received), remedy=remedy))


def _show_without_ours() -> None:
    """Have the traceback that is about to be shown begin in the script, and pass over our frames in the middle."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        trace = strip_all(error, trace)
        shown(kind, error.with_traceback(trace), trace)

    sys.excepthook = hook


def is_ours(file: str) -> bool:
    """Whether it is one of wrapprec's files.

    Args:
        file: its full path.
    """
    return file.startswith(_OURS)


def strip_all(error: BaseException, trace: TracebackType | None) -> TracebackType | None:
    """Take our frames out of a traceback, and out of those of the errors that led to it.

    Args:
        error: what was raised.
        trace: its frames, the outermost first.

    Returns:
        As `strip`.
    """
    todo, seen = [error.__cause__, error.__context__], {id(error)}
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = strip(one, one.__traceback__)
            todo += [one.__cause__, one.__context__]
    return strip(error, trace)


def strip(error: BaseException, trace: TracebackType | None) -> TracebackType | None:
    """Take the frames of wrapprec and of what ran it out of a traceback.

    Args:
        error: what was raised.
        trace: its frames, the outermost first.

    Returns:
        The frames that are left; all from the script on where an error, not one of its own kinds, is wrapprec's.
    """
    frames = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    ours = [is_ours(frame.tb_frame.f_code.co_filename) for frame in frames]
    runner = [number for number, frame in enumerate(frames) if frame.tb_frame.f_code.co_filename == __file__]
    start = runner[-1] + 1 if runner else 0
    is_defect = bool(ours) and ours[-1] and len(frames) > start + 1 and not isinstance(error, WrapprecError)
    kept = [f for f, mine in zip(frames[start:], ours[start:], strict=True) if is_defect or not mine]
    for frame, following in zip(kept, [*kept[1:], None], strict=False):
        frame.tb_next = following
    return kept[0] if kept else None
