"""How fp8 numbers are scaled: torchao's three recipes, by name."""

from __future__ import annotations

from wrapprec.dtypes import Dtype, name
from wrapprec.errors import PolicyError, message, nearest

TENSORWISE = "tensorwise"
RECIPES = (TENSORWISE, "rowwise", "rowwise_with_gw_hp")
"""One scale a tensor; one a row or column; the latter, with the weights' gradients computed in bfloat16."""


def read_recipe(recipe: str | None, compute: Dtype) -> str | None:
    """Read the recipe of a precision.

    Args:
        recipe: its name in any case, or None.
        compute: the compute dtype.

    Returns:
        The recipe where the compute dtype is fp8, None elsewhere.

    Raises:
        PolicyError: it is unknown, or there is one and nothing computes in fp8.

    >>> read_recipe(None, "fp8"), read_recipe("Rowwise", "fp8"), read_recipe(None, "tf32")
    ('tensorwise', 'rowwise', None)
    """
    if recipe is None:
        return TENSORWISE if compute == "fp8" else None
    if compute != "fp8":
        raise PolicyError(
            message(
                "a recipe where the compute dtype is fp8 only",
                f"recipe={recipe}, compute={name(compute)}",
                remedy="leave the recipe out, or compute in fp8",
            )
        )
    folded = str(recipe).lower()
    if folded in RECIPES:
        return folded
    raise PolicyError(
        message(
            f"an fp8 recipe, one of {', '.join(RECIPES)}",
            repr(recipe),
            remedy=nearest(folded, RECIPES) + "write one of these",
        )
    )
