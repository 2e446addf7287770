"""Jupyter notebooks: the code is rewritten through all cells, and every other byte stays."""

from __future__ import annotations

import difflib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import LEGACY

from wrapprec.migrate.rewrite.notebook import NotANotebookError, rewrite_notebook, sources

NOTEBOOK = (LEGACY / "notebook.ipynb").read_text("utf-8")


def _changes(before: str, after: str) -> list[str]:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[0] in "+-" and not line.startswith(("+++", "---"))]


def test_only_the_lines_that_change_are_other_bytes() -> None:
    after, result = rewrite_notebook(NOTEBOOK)
    assert result.changed and not result.left
    old = json.loads(NOTEBOOK)["cells"][4]["source"]
    new = old.replace("    with autocast():\n        loss", "    loss").replace("scaler.scale(loss)", "loss")
    new = new.replace("scaler.step(optimizer)\n    scaler.update()", "optimizer.step()")
    assert _changes(NOTEBOOK, after) == [
        '-    "from torch.cuda.amp import autocast, GradScaler"',
        '+    "import wrapprec"',
        '-    "scaler = GradScaler()\\n"',
        '+    "wrapprec.wrap(model, optimizer, \\"16-mixed\\")\\n"',
        f'-   "source": {json.dumps(old)}',
        f'+   "source": {json.dumps(new)}',
    ]
    assert rewrite_notebook(after)[0] == after
    assert after.endswith("}\n") and "größer" in after


def test_magics_and_cells_in_other_languages_survive() -> None:
    cells = json.loads(rewrite_notebook(NOTEBOOK)[0])["cells"]
    assert cells[1]["source"][:2] == ["%matplotlib inline\n", "!echo installed\n"]
    assert cells[2]["source"][0] == "%%time\n"
    assert cells[3]["source"] == ["%%bash\n", "echo scaler.update()"]
    assert "    %time y = x.sum" in cells[4]["source"]


@pytest.mark.parametrize("indent", [None, 1, 2, "\t"])
@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("end", ["", "\n"])
def test_indentation_escapes_and_the_last_line_stay(indent: int | str | None, is_ascii: bool, end: str) -> None:
    text = json.dumps(json.loads(NOTEBOOK), indent=indent, ensure_ascii=is_ascii) + end
    after, result = rewrite_notebook(text)
    assert result.changed
    assert json.dumps(json.loads(after), indent=indent, ensure_ascii=is_ascii) + end == after


def test_lines_of_remarks_count_through_the_code_cells() -> None:
    text = NOTEBOOK.replace('"scaler = GradScaler()\\n"', '"scaler = GradScaler()\\n",\n    "scaler.odd()\\n"')
    after, result = rewrite_notebook(text)
    # 4 lines in the first code cell, and the sixth of the second
    assert after == text and [(one.line, one.words) for one in result.left] == [(10, "`scaler.odd` has no counterpart")]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cells": 3}', '{"cells": [1]}', '{"worksheets": []}'])
def test_what_is_no_notebook_is_refused(text: str) -> None:
    with pytest.raises(NotANotebookError):
        rewrite_notebook(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(
    extra=st.dictionaries(st.text(), _JSON, max_size=3),
    texts=st.lists(st.text() | st.lists(st.text(), max_size=3), max_size=4),
    indent=st.sampled_from([None, 0, 1, "\t"]),
    is_ascii=st.booleans(),
)
def test_sources_are_found_in_any_notebook(
    extra: dict[str, object], texts: list[object], indent: int | str | None, is_ascii: bool
) -> None:
    cells = [{**extra, "cell_type": "code", "source": text} for text in texts]
    document = json.dumps({**extra, "cells": cells}, indent=indent, ensure_ascii=is_ascii)
    found = [json.loads(document[span.begin : span.end]) for span in sources(document)]
    assert found == texts
