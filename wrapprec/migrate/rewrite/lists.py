"""Arguments and parameters that lost members, as a tidy list."""

from __future__ import annotations

from typing import Any

from wrapprec.migrate.rewrite.syntax import cst

GONE = "__wrapprec_gone__"
"""Stands where something was until what is around it is mended: comments move, stars and commas go."""


def commas(original: Any, updated: Any, name: str) -> Any:
    """A list that lost its last member ends as it did."""
    before, now = getattr(original, name), getattr(updated, name)
    if len(now) == len(before) or not now:
        return updated
    changed = {"comma": before[-1].comma}
    if name == "args":
        changed["whitespace_after_arg"] = before[-1].whitespace_after_arg
    return updated.with_changes(**{name: [*now[:-1], now[-1].with_changes(**changed)]})


def parameters(original: Any, updated: Any) -> Any:
    """The parameters that stay, without a star or slash that speaks of none."""
    kept = {
        name: [one for one in getattr(updated, name) if one.name.value != GONE]
        for name in ("posonly_params", "params", "kwonly_params")
    }
    if all(len(kept[name]) == len(getattr(original, name)) for name in kept):
        return updated
    ends: dict[str, Any] = {}
    if not kept["kwonly_params"] and isinstance(updated.star_arg, cst.ParamStar):
        ends["star_arg"] = cst.MaybeSentinel.DEFAULT
    if not kept["kwonly_params"] and original.kwonly_params and isinstance(updated.star_arg, cst.Param):
        ends["star_arg"] = updated.star_arg.with_changes(comma=original.kwonly_params[-1].comma)
    if not kept["posonly_params"]:
        ends["posonly_ind"] = cst.MaybeSentinel.DEFAULT
    updated = updated.with_changes(**kept, **ends)
    if kept["kwonly_params"] or updated.star_kwarg is not None:
        return commas(original, updated, "kwonly_params")
    if original.kwonly_params and not kept["kwonly_params"] and isinstance(original.star_arg, cst.ParamStar):
        last = kept["params"] or kept["posonly_params"]
        name = "params" if kept["params"] else "posonly_params"
        changed = [*last[:-1], last[-1].with_changes(comma=original.kwonly_params[-1].comma)] if last else []
        return updated.with_changes(**{name: changed})
    return commas(original, commas(original, updated, "kwonly_params"), "params")
