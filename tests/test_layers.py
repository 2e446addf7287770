"""Imports go one way: only the edges that this table has. CONTRIBUTING.md shows the same table to people."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import wrapprec

PACKAGE = Path(wrapprec.__file__).parent

# From the bottom up. A module imports from the layers that its own layer names, and from the modules that stand
# before it in its own layer.
LAYERS: dict[str, str] = {
    "leaves": "errors undo",
    "values": "dtypes tree reach hooked sharded cast lowbit lowbit.packages lowbit.sizes",
    "wants": "grammar lossscale recipe precision rule policy allowlist fills",
    "choice": "backends backends.fast backends.float8 backends.recording backends.recurrent backends.norms"
    " backends.bits backends.counted backends.base backends.cpu backends.cuda backends.xla backends.generic"
    " backends.select defaults lowbit.quantisable lowbit.forms"
    " footprint memory placement fits walk plan fsdp",
    "state": "current levels standin lent flags bucket scale border boundary ranks schedule audit diagnose state",
    "effects": "capture copies writes escape checks carried recompute computed gathered outward modes replicas"
    " census scope island again native operands lowbit.float8 lowbit.products lowbit.fourbits lowbit.eightbits traced"
    " mismatch region forward",
    "step": "patch lowbit.codes lowbit.loading lowbit.optimizer closure fused hold resume verdict step",
    "weights": "lowbit.words lowbit.keep lowbit.states lowbit.managers lowbit.convert lowbit.rounding lowbit.attach"
    " lowbit.checkpoint lowbit.quantised",
    "wrap": "install prepared handle wrap",
    "tools": "migrate migrate.outcome migrate.roots migrate.byhand migrate.watch migrate.find"
    " migrate.apex.notes migrate.apex.options migrate.apex.session migrate.apex.casts"
    " migrate.apex.saved migrate.apex.first migrate.apex.amp migrate.apex.scalers migrate.apex.masters"
    " migrate.apex.fp16_utils migrate.apex.multi_tensor_apply migrate.apex.normalization migrate.apex.optimizers"
    " migrate.apex.larc migrate.apex.parallel migrate.apex"
    " migrate.alias migrate.clock migrate.saving migrate.recorders"
    " migrate.script migrate.frames migrate.children migrate.run"
    " migrate.rewrite migrate.rewrite.syntax migrate.rewrite.targets migrate.rewrite.lineage"
    " migrate.rewrite.names migrate.rewrite.facts"
    " migrate.rewrite.found migrate.rewrite.edits migrate.rewrite.lists migrate.rewrite.comments"
    " migrate.rewrite.apply migrate.rewrite.imports"
    " migrate.rewrite.shim migrate.rewrite.order migrate.rewrite.foreign"
    " migrate.rewrite.place migrate.rewrite.skips migrate.rewrite.scalers migrate.rewrite.makers migrate.rewrite.casts"
    " migrate.rewrite.units migrate.rewrite.settings migrate.rewrite.passing migrate.rewrite.mistakes"
    " migrate.rewrite.amp migrate.rewrite.apex migrate.rewrite.plain migrate.rewrite.loops"
    " migrate.rewrite.halves migrate.rewrite.trainers migrate.rewrite.source"
    " migrate.rewrite.notebook migrate.rewrite.files migrate.command",
    "package": "__init__",
    "cli": "cli __main__",
}
MAY_IMPORT: dict[str, str] = {
    "leaves": "",
    "values": "leaves",
    "wants": "leaves values",
    "choice": "leaves values wants",
    "state": "leaves values wants choice",
    "effects": "leaves values wants state",
    "step": "leaves values choice state",
    "weights": "leaves values choice state effects step",
    "wrap": "leaves values wants choice state effects step weights",
    "tools": "leaves values wants choice state effects step wrap",
    "package": "leaves wants choice effects wrap",
    "cli": "package",
}
# Edges against the order, each inside a function, each with the reason why it is still there.
AGAINST: dict[tuple[str, str], str] = {}

LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules.split()}
POSITION = {module: number for number, module in enumerate(LAYER_OF)}


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


def _imports(source: str, name: str) -> set[str]:
    """The modules of wrapprec that a module imports at run time, inside functions too; not those for annotations."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for below in node.orelse:
                visit(below)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                package = ["wrapprec", *name.split(".")][: -node.level]
                home = ".".join([*package, *home.split(".")]).rstrip(".")
            for alias in node.names:
                is_module = f"{home}.{alias.name}".removeprefix("wrapprec.") in _modules()
                found.add(f"{home}.{alias.name}" if is_module else home)
        for below in ast.iter_child_nodes(node):
            visit(below)

    visit(ast.parse(source))
    ours = {module for module in found if module.partition(".")[0] == "wrapprec"}
    return {module.removeprefix("wrapprec").removeprefix(".") or "__init__" for module in ours}


def _allowed(importer: str, imported: str) -> bool:
    if LAYER_OF[importer] == LAYER_OF[imported]:
        return POSITION[imported] < POSITION[importer]
    return LAYER_OF[imported] in MAY_IMPORT[LAYER_OF[importer]].split()


def _edges() -> set[tuple[str, str]]:
    return {(name, to) for name, path in _modules().items() for to in _imports(path.read_text("utf-8"), name)}


def test_every_module_has_its_layer() -> None:
    assert set(_modules()) == set(LAYER_OF)


def test_layers_import_only_layers_below_them() -> None:
    order = list(LAYERS)
    for layer, below in MAY_IMPORT.items():
        assert all(order.index(name) < order.index(layer) for name in below.split()), layer


def test_every_import_is_an_edge_of_the_table() -> None:
    against = {edge for edge in _edges() if not _allowed(*edge)} - set(AGAINST)
    assert not against, f"not in the table: {sorted(against)}"


def test_edges_against_the_order_still_exist() -> None:
    assert set(AGAINST) <= _edges(), "strike them from AGAINST"


def test_table_names_no_layer_that_nothing_needs() -> None:
    used = {(LAYER_OF[a], LAYER_OF[b]) for a, b in _edges() if LAYER_OF[a] != LAYER_OF[b]}
    written = {(layer, below) for layer, names in MAY_IMPORT.items() for below in names.split()}
    assert written <= used, f"strike from MAY_IMPORT: {sorted(written - used)}"


def test_contributing_shows_the_same_layers() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (\w+) \| (`.*?`) \|", text, re.MULTILINE)
    shown = {layer: re.findall(r"`(\w+)`", modules) for layer, modules in rows}
    for layer, modules in LAYERS.items():
        names = [module for module in modules.split() if "." not in module]
        assert layer == "package" or shown[layer] == names


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import wrapprec.plan", {"plan"}),
        ("from wrapprec import dtypes", {"dtypes"}),
        ("from wrapprec import wrap_it", {"__init__"}),
        ("from wrapprec.backends.base import Backend", {"backends.base"}),
        ("def f():\n    from wrapprec.install import refresh", {"install"}),
        ("if TYPE_CHECKING:\n    from wrapprec.forward import Forward", set()),
        ("from .base import Backend", {"backends.base"}),
        ("import torch", set()),
    ],
)
def test_imports_are_found_however_they_are_written(source: str, expected: set[str]) -> None:
    assert _imports(source, "backends.cpu") == expected


def test_devices_are_named_in_backends_only() -> None:
    named = re.compile(r"\b(cuda|mkldnn|xla|torch_xla|mps)\b", re.IGNORECASE)
    for name, path in _modules().items():
        if not name.startswith("backends"):
            text = path.read_text("utf-8")
            assert not re.search(r"device\.type\s*==\s*[\"']", text), name
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                if token.type == tokenize.NAME:
                    assert not named.fullmatch(token.string), f"{name}:{token.start[0]}"


def test_optional_packages_are_imported_inside_a_function_and_in_one_place() -> None:
    homes: dict[str, set[str]] = {}
    optional = {"accelerate", "bitsandbytes", "torchao", "torch_xla", "libcst"}
    optional |= {"rich", "jinja2", "numpy", "timm", "tomli", "transformers"}
    for name, path in _modules().items():
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for package in {n.partition(".")[0] for n in names} & optional:
                    assert node not in tree.body, f"{name} imports {package} at its top"
                    homes.setdefault(package, set()).add(name)
    assert all(len(where) == 1 for where in homes.values()), homes
