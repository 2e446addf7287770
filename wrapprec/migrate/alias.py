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

from wrapprec.errors import message

_HOME = "wrapprec.migrate.apex"


class ApexFinder(importlib.abc.MetaPathFinder):
    """Finds `apex` and what is below it in `wrapprec.migrate.apex`; the last of all finders.

    Libraries that look whether Apex is there, to use its kernels, are not told so: the importer must be no installed
    package.

    Args:
        say: takes one line, at the first import.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say
        self._below = _Below(self)

    def install(self) -> None:
        """Look here last; and first for what is below an `apex` that was found here."""
        sys.meta_path.append(self)
        sys.meta_path.insert(0, self._below)

    def remove(self) -> None:
        """Look here no more; what was imported stays."""
        sys.meta_path.remove(self)
        sys.meta_path.remove(self._below)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find `apex` or a part of it, for `import`."""
        if fullname.partition(".")[0] != "apex" or _is_installed(_importer()):
            return None
        return self.find(fullname)

    def find(self, fullname: str) -> importlib.machinery.ModuleSpec | None:
        """Find `apex` or a part of it, for anyone."""
        real = f"wrapprec.migrate.{fullname}"
        try:
            found = importlib.util.find_spec(real)
        except ModuleNotFoundError:  # what is above it is missing, or no package
            found = None
        if found is None:
            if _asks_only():
                return None
            raise ModuleNotFoundError(_missing(fullname), name=fullname)
        if self._say is not None:
            self._say(f"Apex's amp is not installed: {_HOME} stands in for it")
            self._say = None
        return importlib.machinery.ModuleSpec(fullname, _Loader(real), is_package=fullname == "apex")


class _Below(importlib.abc.MetaPathFinder):
    """Finds the parts of an `apex` that is ours: Python would make second copies of them from its folder."""

    def __init__(self, finder: ApexFinder) -> None:
        self._finder = finder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a part, for `import`."""
        ours = fullname.startswith("apex.") and sys.modules.get("apex") is sys.modules.get(_HOME)
        return self._finder.find(fullname) if ours else None


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
        package = self._real.removeprefix("wrapprec.migrate.")
        for file in _FILES.get(package, "").split():
            # Before anyone asks: an import would put the file in the place of a class of its name, such as LARC.
            sys.modules.setdefault(f"{package}.{file}", module)
            vars(module).setdefault(file, module)


_FILES = {
    "apex.amp": "_amp_state amp frontend handle",
    "apex.fp16_utils": "fp16_optimizer fp16util loss_scaler",
    "apex.multi_tensor_apply": "multi_tensor_apply",
    "apex.normalization": "fused_layer_norm",
    "apex.optimizers": "fp16_optimizer fused_adagrad fused_adam fused_lamb fused_novograd fused_sgd",
    "apex.parallel": "LARC distributed optimized_sync_batchnorm sync_batchnorm",
}
"""By package of Apex: the files in it that scripts import from, and that checkpoints name; the package has it all."""

_INSTEAD = {
    "RNN": "torch.nn.LSTM and its like",
    "contrib": "torch's own: cross_entropy(label_smoothing=...), scaled_dot_product_attention, GroupNorm",
    "fused_dense": "torch.nn.Linear",
    "mlp": "torch.nn.Sequential of Linear and ReLU",
    "pyprof": "torch.profiler",
    "reparameterization": "torch.nn.utils.parametrizations.weight_norm",
    "transformer": "torch.nn's layers, and torch.distributed.tensor.parallel",
}


def _missing(name: str) -> str:
    """What an import of a part that there is not says."""
    part = name.split(".")[1] if "." in name else ""
    remedy = f"use {_INSTEAD[part]}" if part in _INSTEAD else "install Apex itself for it, or do without"
    return message(f"a part of Apex that {_HOME} stands in for", f"an import of {name}", remedy=remedy)


def _asks_only() -> bool:
    """Whether `importlib.util.find_spec` was called, which gives None for what is not there."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(("<frozen importlib", __file__, _IMPORTLIB)):
        if frame.f_code is importlib.util.find_spec.__code__:
            return True
        frame = frame.f_back
    return False


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
