"""Graphs of kernels on a CPU: records the operations that run, and replays them on the same memory, without Python.

What a CUDA graph does to a program is all here: a replay runs the kernels with the addresses that they were recorded
with, memory that was allocated while recording stays the graph's, memory from before does not, and nothing may be read
on the host meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from wrapprec.backends.cpu import CpuBackend

_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}


class FreedMemory(Exception):
    """A replay would read or write memory that is nobody's any more."""


class Place:
    """Where a tensor from outside was; it is not kept alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.view = tensor.storage_offset(), tensor.shape, tensor.stride()
        self.dtype = tensor.dtype

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise FreedMemory(f"{self.dtype} {tuple(self.view[1])}")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


class Graph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`; what runs while it is entered is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.own: set[int] = set()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        placed = tree_map(self._place, (args, kwargs))
        out = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in given:
                self.own.add(made.untyped_storage()._cdata)
                self.kept.append(made.detach())
        self.calls.append((func, *placed, tree_map(self._place, out)))
        return out

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Of the graph's own memory: kept, as its pool is.
        return value.detach() if value.untyped_storage()._cdata in self.own else Place(value)

    def replay(self) -> None:
        def there(value: Any) -> Any:
            return value.tensor() if isinstance(value, Place) else value

        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, out in self.calls:
                made = func(*tree_map(there, args), **tree_map(there, kwargs))
                for before, now in zip(tree_leaves(out), tree_leaves(made), strict=True):
                    if isinstance(before, Tensor) and before.data_ptr() != now.data_ptr():
                        before.data.copy_(now)


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.cuda.graph` and `make_graphed_callables` record on the CPU, as if its backend were CUDA's."""
    recording: list[Graph] = []

    @contextlib.contextmanager
    def graph(one: Graph, pool: Any = None) -> Iterator[None]:
        recording.append(one)
        try:
            with one:
                yield
        finally:
            recording.pop()

    @contextlib.contextmanager
    def stream(one: Any = None) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(CpuBackend, "is_recording", lambda self: bool(recording))
