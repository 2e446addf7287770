"""What an error says, and that it survives the trip between processes."""

from __future__ import annotations

import inspect
import pickle

import pytest
from torch import nn

from wrapprec import errors
from wrapprec.errors import PolicyError, WrapprecError, message, module_label, nearest

EVERY_ERROR = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_message_has_four_parts_in_order() -> None:
    text = message("float32 outputs", "output=float16", where='"head" (Linear)', remedy="use output=float32")
    assert text == (
        'Expected float32 outputs.\nReceived: output=float16\nWhere: "head" (Linear)\nRemedy: use output=float32'
    )


def test_message_without_a_place_leaves_the_line_out() -> None:
    assert message("a", "b", remedy="c") == "Expected a.\nReceived: b\nRemedy: c"


def test_message_ends_the_expectation_with_one_full_stop() -> None:
    assert message("a.", "b", remedy="c").splitlines()[0] == "Expected a."


def test_module_label_names_module_and_class() -> None:
    assert module_label("decoder.norm", nn.LayerNorm(2)) == '"decoder.norm" (LayerNorm)'


def test_module_label_calls_the_root_the_model_itself() -> None:
    assert module_label("", nn.Sequential()) == '"" (the model itself, Sequential)'


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("qqqq", ["bf16-mixed"]) == ""


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_every_error_survives_pickling(kind: type[Exception]) -> None:
    error = kind(message("a", "b", remedy="c"))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.PolicyError, ValueError),
        (errors.AlreadyWrappedError, RuntimeError),
        (errors.NotWrappedError, RuntimeError),
        (errors.ModelChangedError, RuntimeError),
        (errors.DtypeMismatchError, RuntimeError),
        (errors.ScaleLeakError, RuntimeError),
        (errors.NonFiniteError, FloatingPointError),
        (errors.StepError, RuntimeError),
    ],
)
def test_every_error_is_ours_and_the_builtin_one(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, WrapprecError)
    assert issubclass(kind, builtin)


def test_policy_errors_are_caught_as_value_errors() -> None:
    with pytest.raises(ValueError, match="Expected a dtype"):
        raise PolicyError(message("a dtype", "nothing", remedy="name one"))
