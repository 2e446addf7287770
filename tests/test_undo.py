"""What is put back, in which order, and what is left alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wrapprec.undo import ABSENT, UndoStack


class Thing:
    """An object with attributes; at the top level so that it pickles."""

    colour: Any = "class"


def test_attribute_absent_before_is_absent_after() -> None:
    thing, stack = Thing(), UndoStack()
    stack.set_attribute(thing, "colour", "own")
    assert thing.colour == "own"
    assert stack.undo() == []
    assert vars(thing) == {}


def test_attribute_present_before_is_the_same_object_after() -> None:
    thing, stack, before = Thing(), UndoStack(), [1]
    thing.size = before  # type: ignore[attr-defined]  # made up here
    stack.set_attribute(thing, "size", [2])
    stack.undo()
    assert vars(thing)["size"] is before


def test_parameter_is_not_registered_by_set_attribute() -> None:
    layer, stack = nn.Linear(2, 2), UndoStack()
    names = [name for name, _ in layer.named_parameters()]
    stack.set_attribute(layer, "shadow", nn.Parameter(torch.ones(1)))
    assert [name for name, _ in layer.named_parameters()] == names
    stack.undo()
    assert "shadow" not in vars(layer)


def test_value_replaced_by_somebody_else_is_left_alone_and_reported() -> None:
    thing, stack = Thing(), UndoStack()
    stack.set_attribute(thing, "colour", "ours")
    thing.colour = "theirs"
    assert stack.undo() == [(thing, "colour")]
    assert thing.colour == "theirs"


def test_value_deleted_by_somebody_else_is_left_alone_and_reported() -> None:
    thing, stack = Thing(), UndoStack()
    thing.colour = "before"
    stack.set_attribute(thing, "colour", "ours")
    del thing.colour
    assert stack.undo() == [(thing, "colour")]
    assert vars(thing) == {}


def test_equal_but_other_value_is_not_ours() -> None:
    thing, stack = Thing(), UndoStack()
    stack.set_attribute(thing, "colour", [1])
    thing.colour = [1]
    assert stack.undo() == [(thing, "colour")]


def test_entries_are_undone_last_in_first_out() -> None:
    stack, order = UndoStack(), []
    for number in range(3):
        stack.push(lambda number=number: order.append(number))  # type: ignore[misc]  # bound now
    stack.undo()
    assert order == [2, 1, 0]


def test_undo_twice_is_undo_once() -> None:
    stack, count = UndoStack(), []
    stack.push(lambda: count.append(1))
    stack.undo()
    assert stack.undo() == []
    assert count == [1]


def test_undo_goes_on_past_a_failing_entry_and_raises_the_first_failure() -> None:
    thing, stack = Thing(), UndoStack()

    def fail(text: str) -> None:
        raise RuntimeError(text)

    stack.set_attribute(thing, "colour", "ours")
    stack.push(lambda: fail("older"))
    stack.push(lambda: fail("newest"))
    with pytest.raises(RuntimeError, match="newest"):
        stack.undo()
    assert vars(thing) == {}
    assert stack.undo() == []


@pytest.mark.parametrize("trip", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copied_stack_puts_back_the_copied_object(trip: Any) -> None:
    thing, stack = Thing(), UndoStack()
    stack.set_attribute(thing, "colour", ["ours"])
    other, copied = trip((thing, stack))
    assert copied.undo() == []
    assert vars(other) == {}
    assert thing.colour == ["ours"]


def test_absent_stays_one_object_through_copies() -> None:
    assert copy.deepcopy(ABSENT) is ABSENT
    assert pickle.loads(pickle.dumps(ABSENT)) is ABSENT


@given(
    before=st.dictionaries(st.sampled_from("abc"), st.integers()),
    writes=st.lists(st.tuples(st.sampled_from("abc"), st.integers())),
)
def test_any_writes_are_undone_to_the_attributes_before(before: dict[str, int], writes: list[tuple[str, int]]) -> None:
    thing, stack = Thing(), UndoStack()
    vars(thing).update(before)
    for name, value in writes:
        stack.set_attribute(thing, name, value)
    assert stack.undo() == []
    assert vars(thing) == before
