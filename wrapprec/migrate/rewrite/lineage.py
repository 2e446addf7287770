"""Classes of a file above and below each other: which of them an attribute of `self` belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from wrapprec.migrate.rewrite.syntax import cst


class Lineage:
    """Knows the classes of a file by their bases in the same file."""

    def __init__(self) -> None:
        self._bases: dict[cst.ClassDef, list[cst.ClassDef]] = {}
        self._below: dict[cst.ClassDef, list[cst.ClassDef]] = defaultdict(list)
        self._sets: dict[cst.ClassDef, set[str]] = defaultdict(set)
        self._methods: dict[cst.ClassDef, set[str]] = defaultdict(set)

    def read(
        self,
        classes: Iterable[cst.ClassDef],
        find: Callable[[cst.CSTNode], cst.ClassDef | None],
        attributes: Iterable[tuple[cst.ClassDef, str]],
        methods: Iterable[tuple[cst.ClassDef, str]],
    ) -> None:
        """Take in what a file says.

        Args:
            classes: all of the file.
            find: the class of the file that a base is.
            attributes: which class sets which attribute of `self`.
            methods: which class has which method.
        """
        for owner in classes:
            found = [find(base.value) for base in owner.bases if not base.star]
            self._bases[owner] = [one for one in found if one is not None and one is not owner]
            for one in self._bases[owner]:
                self._below[one].append(owner)
        for owner, name in attributes:
            self._sets[owner].add(name)
        for owner, name in methods:
            self._methods[owner].add(name)

    def above(self, owner: cst.ClassDef) -> list[cst.ClassDef]:
        """A class and those above it, the nearest first."""
        return _walk(owner, self._bases)

    def below(self, owner: cst.ClassDef) -> list[cst.ClassDef]:
        """The classes below one."""
        return _walk(owner, self._below)[1:]

    def related(self, one: object, other: object) -> bool:
        """Whether two classes are the same, or one is above the other."""
        if not isinstance(one, cst.ClassDef) or not isinstance(other, cst.ClassDef):
            return False
        return one in self.above(other) or other in self.above(one)

    def owner(self, owner: cst.ClassDef, name: str) -> cst.ClassDef:
        """The class that an attribute of `self` belongs to, asked for in one class.

        A method is the nearest one's. Another attribute is the topmost one's that sets it, so that all classes below
        speak of the same; where only one class below sets it, it is that one's.
        """
        if not self._bases.get(owner) and owner not in self._below:
            return owner
        line = self.above(owner)
        has = [one for one in line if name in self._methods[one]]
        if has:
            return has[0]
        sets = [one for one in line if name in self._sets[one]]
        if sets:
            return sets[-1]
        found = [one for one in self.below(owner) if name in self._sets[one] or name in self._methods[one]]
        return found[0] if len(found) == 1 else owner


def _walk(owner: cst.ClassDef, edges: dict[cst.ClassDef, list[cst.ClassDef]]) -> list[cst.ClassDef]:
    found = [owner]
    for one in found:  # it grows while it is walked
        found += [other for other in edges.get(one, []) if other not in found]
    return found
