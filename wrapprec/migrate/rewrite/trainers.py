"""Functions of other files that train what they are given: the line with `wrap` belongs to the file that calls them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wrapprec.migrate.rewrite.imports import uses_wrapprec
from wrapprec.migrate.rewrite.names import Names, Symbol
from wrapprec.migrate.rewrite.plain import manager_of
from wrapprec.migrate.rewrite.syntax import cst, each

_PRECISION = ("autocast", "scaler", "apex", "amp.", ".half(", "float16")
"""A file with one of these is no plain one: what it does with a wrapped model is not looked into."""


@dataclass(frozen=True, eq=False)
class Trainer:
    """A function that goes backward and steps optimizers that are its parameters.

    Args:
        path: of its file, resolved.
        function: the definition.
        steps: the parameters that it steps.
        line: of its first `backward()`.
    """

    path: Path
    function: cst.FunctionDef
    steps: frozenset[str]
    line: int


def read_trainers(path: Path, module: cst.Module) -> list[Trainer]:
    """Find the trainers of a file that has nothing to do with precision.

    Args:
        path: of the file.
        module: what is in it.
    """
    code = module.code.lower()
    if ".backward(" not in code or any(word in code for word in _PRECISION) or uses_wrapprec(module):
        return []
    names = Names(module)
    if manager_of(names) is not None:
        return []
    found = []
    for function in [one for one in module.body if isinstance(one, cst.FunctionDef)]:
        calls = [one for one in each(function.body) if isinstance(one, cst.Call)]
        methods = [(one.func, one) for one in calls if isinstance(one.func, cst.Attribute)]
        backward = [one for func, one in methods if func.attr.value == "backward"]
        stepped = [names.symbol(func.value) for func, _ in methods if func.attr.value == "step"]
        steps = {one[1] for one in stepped if one is not None and names.params.get(one) is function}
        steps -= {symbol[1] for symbol in [*names.values, *names.moving] if names.params.get(symbol) is function}
        if backward and steps and not names.calls.get(function):
            found.append(Trainer(path.resolve(), function, frozenset(steps), names.line(backward[0])))
    return found


class Elsewhere:
    """The trainers of the files that were given, as one of these files sees them.

    Args:
        trainers: of all files.
        files: all files, resolved.
        here: the file that looks.
    """

    def __init__(self, trainers: Iterable[Trainer] = (), files: Sequence[Path] = (), here: Path | None = None) -> None:
        self._here = here
        self._files = files
        self._found = {(one.path, one.function.name.value): one for one in trainers if one.path != here}

    def is_named_in(self, code: str) -> bool:
        """Whether a text has the name of any trainer."""
        return any(name in code for _, name in self._found)

    def calls(self, names: Names) -> list[tuple[Trainer, set[Symbol]]]:
        """Each trainer that a file calls, with the roots of the optimizers that it gives.

        Args:
            names: of the file.
        """
        if not self._found:
            return []
        found = []
        for node in names.nodes:
            trainer = self._called(node, names) if isinstance(node, cst.Call) else None
            if isinstance(node, cst.Call) and trainer is not None:
                bound = names.bind(node, trainer.function)
                given = [names.symbol(arg.value) for name, arg in bound.items() if name in trainer.steps]
                found.append((trainer, {root for one in given if one is not None for root in names.roots(one)}))
        return found

    def _called(self, call: cst.Call, names: Names) -> Trainer | None:
        for name in names.qualified(call.func):
            *parts, last = name.lstrip(".").split(".")
            path = self._resolve(parts, len(name) - len(name.lstrip("."))) if parts else None
            if path is not None and (path, last) in self._found:
                return self._found[(path, last)]
        return None

    def _resolve(self, parts: Sequence[str], dots: int) -> Path | None:
        """The given file that an import means: the one beside, or the only one of that name."""
        assert self._here is not None
        above = self._here.parents[max(dots, 1) - 1 : max(dots, 1)]
        beside = [one.joinpath(*parts).with_suffix(".py") for one in above]
        if beside and beside[0] in self._files:
            return beside[0]
        count = len(parts)
        same = [one for one in self._files if [*one.parts[-count:-1], one.stem] == list(parts)]
        return same[0] if len(same) == 1 and not dots else None
