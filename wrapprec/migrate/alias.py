"""Lets a script that imports Apex run where Apex, or its `amp`, is not installed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class ApexFinder(importlib.abc.MetaPathFinder):
    """Finds `apex` and what is below it in `wrapprec.migrate.apex`; the last of all finders.

    Libraries that look whether Apex is there, to use its kernels, are not told so: the importer must be no installed
    package.

    Args:
        say: takes one line, at the first import.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say

    def install(self) -> None:
        """Look here last."""
        sys.meta_path.append(self)

    def remove(self) -> None:
        """Look here no more; what was imported stays."""
        sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find `apex` or a part of it, for `import`."""
        if fullname.partition(".")[0] != "apex" or _is_installed(_importer()):
            return None
        real = f"wrapprec.migrate.{fullname}"
        try:
            found = importlib.util.find_spec(real)
        except ModuleNotFoundError:
            return None
        if found is None:
            return None
        if self._say is not None:
            self._say("Apex's amp is not installed: wrapprec.migrate.apex stands in for it")
            self._say = None
        return importlib.machinery.ModuleSpec(fullname, _Loader(real), is_package=fullname == "apex")


class _Loader(importlib.abc.Loader):
    """Gives a module that has another name already."""

    def __init__(self, real: str) -> None:
        self._real = real
        self._spec: Any = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the alias's there


_IMPORTLIB = str(Path(importlib.__file__).parent) + os.sep


def _importer() -> str:
    """The file whose code is importing."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(("<frozen importlib", _IMPORTLIB)):
            return str(file)
        frame = frame.f_back
    return ""


def _is_installed(file: str) -> bool:
    return any(part in ("site-packages", "dist-packages") for part in Path(file).parts)
