"""Brings back what a module wrote into inputs that had to be replaced: values in tensors, entries in containers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wrapprec.errors import ModelChangedError, message
from wrapprec.tree import is_container, parts, put

Part = tuple[str, Any, Any]


class Containers:
    """The mutable containers of an input that were copied because a tensor in them was replaced.

    Args:
        old: the arguments and keyword arguments as they were given.
        new: as they are passed on.
    """

    def __init__(
        self, old: tuple[tuple[Any, ...], dict[str, Any]], new: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> None:
        self.pairs: list[tuple[Any, Any, list[Part]]] = []
        # What stood in the given containers, by what stands in the copies; the parts keep the ids from being reused.
        self.given: dict[int, Any] = {}
        seen: set[int] = set()
        for before, after in zip((*old[0], *old[1].values()), (*new[0], *new[1].values()), strict=True):
            self._compare(before, after, seen)

    def _compare(self, old: Any, new: Any, seen: set[int]) -> None:
        if new is old or isinstance(new, Tensor) or id(new) in seen or not is_container(new):
            return
        seen.add(id(new))
        before, after = list(parts(old)), list(parts(new))
        if not isinstance(new, tuple):
            self.pairs.append((old, new, after))
            self.given[id(new)] = old
        for (_, _, was), (_, _, now) in zip(before, after, strict=True):
            if now is not was:
                self.given[id(now)] = was
                self._compare(was, now, seen)

    def bring_back(self) -> None:
        """Make the given containers hold what the copies hold now, where forward has changed those."""
        for old, new, passed in self.pairs:
            now = list(parts(new))
            if len(now) == len(passed) and all(a[1] == b[1] and a[2] is b[2] for a, b in zip(now, passed, strict=True)):
                continue
            entries = [(where, key, self.given.get(id(value), value)) for where, key, value in now]
            if isinstance(old, (list, deque)):
                old.clear()
                old.extend(value for where, _, value in entries if where == "index")
                entries = [entry for entry in entries if entry[0] != "index"]
            elif isinstance(old, dict):
                dict.clear(old)
            for where, key, value in entries:
                put(old, where, key, value)


class Casts:
    """The tensors that one module's inputs were cast from, and to what.

    Args:
        cast: casts a tree, and calls its second argument with each tensor before and after.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    def __init__(self, cast: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tensors: list[tuple[Tensor, Tensor, int]] = []
        if torch.is_inference_mode_enabled():
            # An inference tensor counts no versions, so that a write into it would go unseen.
            with torch.inference_mode(False), torch.no_grad():
                self.args, self.kwargs = cast((args, kwargs), self._note)
        else:
            self.args, self.kwargs = cast((args, kwargs), self._note)
        self.containers = Containers((args, kwargs), (self.args, self.kwargs)) if self.tensors else None

    def _note(self, old: Tensor, new: Tensor) -> None:
        self.tensors.append((old, new, 0 if new.is_inference() else new._version))

    def bring_back(self, where: str) -> None:
        """Copy what was written in place to the tensors and containers that the caller holds.

        Args:
            where: the module, for an error.

        Raises:
            ModelChangedError: the write is a part of the graph, which copying would cut.
        """
        if self.containers is not None and self.containers.pairs:
            self.containers.bring_back()
        for old, new, version in self.tensors:
            if new.is_inference() or new._version == version:
                continue
            if new.requires_grad and torch.is_grad_enabled():
                raise ModelChangedError(
                    message(
                        "a module that does not write into an input that had to be cast",
                        f"an input of shape {tuple(old.shape)} cast from {old.dtype} to {new.dtype} and then modified"
                        " in place",
                        where=where,
                        remedy=f"pass it in {new.dtype}, or add a rule that keeps this module in {old.dtype}",
                    )
                )
            with torch.no_grad():
                old.copy_(new)
