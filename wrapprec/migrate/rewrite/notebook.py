"""Jupyter notebooks: the code cells as one source, and back into the JSON, whose other bytes stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from wrapprec.migrate.rewrite.source import Remark, Result, rewrite
from wrapprec.migrate.rewrite.syntax import cst

_CELL = "__wrapprec_cell__"
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+)')
_MAGIC = re.compile(r"^(\s*)([%!?].*|[^\s#'\"=]+\s*\?{1,2}\s*|\s*[\w., ]+\s*=\s*[%!].*)$")
_PYTHON_CELLS = ("%%time", "%%timeit", "%%capture", "%%prun", "%%memit", "%%snakeviz")


class NotANotebookError(ValueError):
    """The text is JSON at most."""


class Span(NamedTuple):
    """A value in a JSON text: where it begins and ends."""

    begin: int
    end: int


def sources(document: str) -> list[Span]:
    """Where the sources of the code cells of a notebook stand in its text.

    Args:
        document: the text.

    Returns:
        The values under `source`, in order.

    Raises:
        NotANotebookError: it is no notebook of format 4.
    """
    try:
        notebook = json.loads(document)
    except ValueError as error:
        raise NotANotebookError(f"not JSON: {error}") from error
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise NotANotebookError("JSON without a list of cells (notebook format 4)")
    spans: dict[tuple[str | int, ...], Span] = {}
    _walk(document, 0, (), spans)
    numbers = [number for number, cell in enumerate(cells) if cell.get("cell_type") == "code" and "source" in cell]
    return [spans["cells", number, "source"] for number in numbers]


def _walk(document: str, at: int, path: tuple[str | int, ...], spans: dict[tuple[str | int, ...], Span]) -> int:
    """Note where every value stands; gives the end of the one that begins here."""
    token = _TOKEN.match(document, at)
    assert token is not None
    begin, end = token.span(1)
    closing = {"[": "]", "{": "}"}.get(token.group(1))
    number = 0
    while closing is not None:
        following = _TOKEN.match(document, end)
        assert following is not None
        if following.group(1) == closing:
            end = following.end()
            break
        if following.group(1) == ",":
            end = following.end()
            continue
        key: str | int = number
        if closing == "}":
            key = json.loads(following.group(1))
            colon = _TOKEN.match(document, following.end())
            assert colon is not None
            end = colon.end()
        end = _walk(document, end, (*path, key), spans)
        number += 1
    spans[path] = Span(begin, end)
    return end


def rewrite_notebook(document: str, policy: str = "auto") -> tuple[str, Result]:
    """Rewrite the code cells of a notebook.

    Args:
        document: its text.
        policy: for loops that had no mixed precision.

    Returns:
        The new text, and what there is to say; lines count through all code cells.

    Raises:
        NotANotebookError: it is no notebook.
        libcst.ParserSyntaxError: the cells are not Python, magics apart.
    """
    spans = sources(document)
    values = [json.loads(document[span.begin : span.end]) for span in spans]
    cells = ["".join(value) if isinstance(value, list) else str(value) for value in values]
    hidden = [_hide(cell) for cell in cells]
    parts = [f"{_CELL}({number})\n{text}\n" for number, (text, _) in enumerate(hidden)]
    result = rewrite(cst.parse_module("".join(parts)), policy)
    result = _relined(result, parts)
    if not result.changed:
        return document, result
    pieces = re.split(rf"^{_CELL}\(\d+\)\n", result.module.code, flags=re.MULTILINE)[1:]
    assert len(pieces) == len(cells)
    for number in reversed(range(len(cells))):
        cell = _show(pieces[number].removesuffix("\n"), hidden[number][1])
        if cell != cells[number]:
            span = spans[number]
            new = _written(document[span.begin : span.end], cell, values[number])
            document = document[: span.begin] + new + document[span.end :]
    return document, result


def _hide(cell: str) -> tuple[str, list[str]]:
    """Put a name where a magic is; a cell in another language is all magic."""
    if cell.lstrip().startswith("%%") and not cell.lstrip().startswith(_PYTHON_CELLS):
        return "__wrapprec_magic__(0)", [cell]
    lines: list[str] = []
    magics: list[str] = []
    goes_on = False
    for line in cell.split("\n"):
        found = None if goes_on else _MAGIC.match(line)
        if goes_on:  # `!pip install \\` and what follows: one call over as many lines
            magics[-1] += f"\n{line}"
            head, bracket, number = lines.pop().rpartition("(")
            lines += [head + bracket, number]
        elif found:
            indent = re.match(r"\s*", line)
            lines.append(f"{indent.group() if indent else ''}__wrapprec_magic__({len(magics)})")
            magics.append(line)
        else:
            lines.append(line)
        goes_on = bool(found or goes_on) and line.rstrip().endswith("\\")
    return "\n".join(lines), magics


def _show(text: str, magics: Sequence[str]) -> str:
    return re.sub(r"[ \t]*__wrapprec_magic__\(\s*(\d+)\)", lambda found: magics[int(found.group(1))], text)


def _relined(result: Result, parts: Sequence[str]) -> Result:
    """Count lines through the cells as a reader does: without the lines that mark them."""
    starts, line = [], 1
    for part in parts:
        starts.append(line)
        line += part.count("\n")

    def move(remark: Remark) -> Remark:
        return Remark(remark.line - sum(start <= remark.line for start in starts), remark.words)

    left, notes = tuple(map(move, result.left)), tuple(map(move, result.notes))
    return Result(result.module, result.changed, left, notes)


def _written(old: str, cell: str, value: Any) -> str:
    """Write a source as the old one was written: lines that stay keep their own escapes and spaces."""
    is_ascii = old.isascii()
    if not isinstance(value, list):
        return json.dumps(cell, ensure_ascii=is_ascii)
    raw = [found.group(0) for found in re.finditer(r'"(?:[^"\\]|\\.)*"', old)]
    known = dict(zip(value, raw, strict=True))
    lines = cell.splitlines(keepends=True) if "\r" not in cell else re.findall(r"[^\n]*\n|[^\n]+", cell)
    first = re.match(r"\[(\s*)", old)
    last = re.search(r"(\s*)\]$", old)
    between = re.search(r'"(\s*,\s*)"', re.sub(r'"(?:[^"\\]|\\.)*"', '""', old))
    before = first.group(1) if first else ""
    joint = between.group(1) if between else f",{before}" if before else ", "
    written = [known.get(line) or json.dumps(line, ensure_ascii=is_ascii) for line in lines]
    return f"[{before}{joint.join(written)}{last.group(1) if last else ''}]" if written else "[]"
