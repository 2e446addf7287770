"""One stack of undo entries, last in first out; it knows nothing of precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class _Absent:
    """The type of `ABSENT`; it stays one object through copying and pickling."""

    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()
"""Stands for an attribute that an instance did not have of its own."""


@dataclass(eq=False)
class _Attribute:
    """An attribute that was set on somebody else's object, and what stood there before."""

    obj: object
    name: str
    value: object
    before: object

    def undo(self) -> tuple[object, str] | None:
        own = self.obj.__dict__
        if own.get(self.name, ABSENT) is not self.value:
            return self.obj, self.name
        if self.before is ABSENT:
            del own[self.name]
        else:
            own[self.name] = self.before
        return None


@dataclass(eq=False)
class _Call:
    """A callable that puts something back."""

    function: Callable[[], object]

    def undo(self) -> None:
        self.function()


@dataclass(eq=False)
class UndoStack:
    """What was done to other people's objects, and how to put it back.

    The stack is a value: it can be deep-copied and pickled as far as the objects it holds can, and a deep copy
    made together with those objects puts back the copies.

    >>> class Thing: pass
    >>> thing, stack = Thing(), UndoStack()
    >>> stack.set_attribute(thing, "colour", "red")
    >>> thing.colour
    'red'
    >>> stack.undo()
    []
    >>> hasattr(thing, "colour")
    False
    """

    entries: list[_Attribute | _Call] = field(default_factory=list)

    def set_attribute(self, obj: Any, name: str, value: object) -> None:
        """Set an attribute in the instance's own `__dict__`, remembering what stood there.

        `nn.Module.__setattr__` would register parameters and modules, so it is passed by.

        Args:
            obj: an object with a `__dict__`.
            name: the attribute.
            value: what to put there; it is recognised by identity when undone.

        >>> from torch import nn
        >>> layer, stack = nn.Linear(2, 2), UndoStack()
        >>> stack.set_attribute(layer, "forward", abs)
        >>> "forward" in vars(layer), stack.undo(), "forward" in vars(layer)
        (True, [], False)
        """
        own = obj.__dict__
        entry = _Attribute(obj, name, value, own.get(name, ABSENT))
        own[name] = value
        self.entries.append(entry)

    def remember(self, obj: Any, name: str, value: object, before: object | None) -> None:
        """Take over an attribute that was set earlier, on the object that this one is a copy of.

        Args:
            obj: an object with a `__dict__`.
            name: the attribute.
            value: what stands there now.
            before: what to put back; None takes the attribute away.
        """
        self.entries.append(_Attribute(obj, name, value, ABSENT if before is None else before))

    def push(self, function: Callable[[], object]) -> None:
        """Remember a callable that puts something back, such as `RemovableHandle.remove`.

        Args:
            function: called without arguments by `undo`.

        >>> stack = UndoStack()
        >>> stack.push(lambda: print("put back"))
        >>> stack.undo()
        put back
        []
        """
        self.entries.append(_Call(function))

    def undo(self) -> list[tuple[object, str]]:
        """Put everything back, newest first, and empty the stack.

        Returns:
            The `(object, attribute name)` pairs left alone because somebody has replaced our value since.

        Raises:
            Exception: the first one an entry raised, once every other entry has been put back.

        >>> UndoStack().undo()
        []
        """
        left: list[tuple[object, str]] = []
        failure: BaseException | None = None
        while self.entries:
            entry = self.entries.pop()
            try:
                kept = entry.undo()
            except BaseException as error:
                failure = error if failure is None else failure
            else:
                if kept is not None:
                    left.append(kept)
        if failure is not None:
            raise failure
        return left
