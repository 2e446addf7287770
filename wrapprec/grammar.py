"""The text of a policy: split it into fields and rules, name classes and functions, read TOML; no meaning yet."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrapprec.errors import PolicyError, message, nearest

KEYS = {
    "params": "params",
    "p": "params",
    "compute": "compute",
    "c": "compute",
    "output": "output",
    "o": "output",
    "casting": "casting",
    "cast_inputs": "cast_inputs",
    "loss_scale": "loss_scale",
    "init_scale": "init_scale",
    "growth_factor": "growth_factor",
    "backoff_factor": "backoff_factor",
    "growth_interval": "growth_interval",
    "min_scale": "min_scale",
    "max_scale": "max_scale",
    "hysteresis": "hysteresis",
    "max_consecutive_skips": "max_consecutive_skips",
    "recipe": "recipe",
    "rounding": "rounding",
    "grads": "grads",
    "strict": "strict",
}
"""Every key that may be written, and the full name it stands for."""

_PLAIN_GLOB = re.compile(r"(?!class:|function:)[\w.*?\[\]!-]+")
_QUOTED_OR = r'"(?:[^"\\]|\\.)*"'


@dataclass(frozen=True)
class Text:
    """A policy as it was written: an optional preset in front, fields by full name, and rules."""

    preset: str | None
    fields: dict[str, str]
    rules: tuple[tuple[Any, str], ...] = ()


def split(text: str) -> Text:
    """Split `preset,key=value,...; select = precision; ...` into its parts.

    Args:
        text: the policy as text.

    Returns:
        The parts; the values are still text, the selects are what rules select by.

    Raises:
        PolicyError: a key is unknown or written twice, or a rule has no `=`.

    >>> split("bf16-mixed,o=bf16; decoder.* = float32")
    Text(preset='bf16-mixed', fields={'output': 'bf16'}, rules=(('decoder.*', 'float32'),))
    """
    head, *rules = _split_at(";", text)
    first, *others = [item.strip() for item in head.split(",")]
    preset = None if "=" in first or not first else first
    pairs = [_pair(item, text) for item in ([first] if preset is None and first else []) + others]
    return Text(preset, collect(pairs), tuple(_split_rule(rule, text) for rule in rules if rule.strip()))


def collect(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Gather written keys under their full names.

    Args:
        pairs: keys as written, with their values.

    Returns:
        Values by full name.

    Raises:
        PolicyError: a key is unknown or means the same as an earlier one.

    >>> collect([("p", "f32"), ("compute", "bf16")])
    {'params': 'f32', 'compute': 'bf16'}
    """
    fields: dict[str, str] = {}
    for key, value in pairs:
        full = KEYS.get(key)
        if full is None:
            raise PolicyError(
                message(f"a policy key, one of {', '.join(KEYS)}", repr(key), remedy=nearest(key, KEYS) + "rename it")
            )
        if full in fields:
            raise PolicyError(
                message(f"each policy key once, but {full!r} comes twice", f"{key}={value}", remedy="drop one of them")
            )
        fields[full] = value
    return fields


def join(fields: Mapping[str, str]) -> str:
    """Print fields as `key=value,...`.

    Args:
        fields: values by full key.

    Returns:
        The text that `split` takes apart again.

    >>> join({"params": "float32", "strict": "false"})
    'params=float32,strict=false'
    """
    return ",".join(f"{key}={value}" for key, value in fields.items())


def _pair(item: str, text: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not value.strip():
        raise PolicyError(
            message("key=value after the first comma", f"{item!r} in {text!r}", remedy="write e.g. output=bfloat16")
        )
    return key.strip().lower(), value.strip()


def _split_at(mark: str, text: str) -> list[str]:
    """Split at a mark that does not stand inside double quotes."""
    parts = [""]
    for token in re.findall(rf"{_QUOTED_OR}|.", text, flags=re.DOTALL):
        if token == mark:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _split_rule(rule: str, text: str) -> tuple[Any, str]:
    select, *precision = _split_at("=", rule)
    if not precision or not "=".join(precision).strip():
        raise PolicyError(
            message("`select = precision` after a semicolon", f"{rule!r} in {text!r}", remedy="write e.g. *.norm = f32")
        )
    return parse_select(select.strip()), "=".join(precision).strip()


def parse_select(text: str) -> Any:
    """Read what a rule selects by.

    Args:
        text: a glob, a glob in double quotes, `class:module.Class` or `function:module:name`.

    Returns:
        The glob, the class or the function, imported.

    Raises:
        PolicyError: it cannot be imported, or was printed from a function that has no importable name.

    >>> parse_select("decoder.*"), parse_select("class:torch.nn.modules.linear.Linear").__name__
    ('decoder.*', 'Linear')
    """
    kind, colon, path = text.partition(":")
    if not colon or kind not in ("class", "function"):
        return json.loads(text) if re.fullmatch(_QUOTED_OR, text, flags=re.DOTALL) else text
    expected = f"an importable {kind} to select by"
    if path.startswith("<"):
        raise PolicyError(
            message(expected, text, remedy=f"move the {kind} to the top level of a module, where it can be imported")
        )
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise PolicyError(
            message(expected, f"{text} ({error})", remedy="write class:module.Class or function:module:name")
        ) from error
    if not (isinstance(found, type) if kind == "class" else callable(found)):
        raise PolicyError(message(expected, f"{text}, which is {found!r}", remedy=f"name a {kind}"))
    return found


def print_select(select: str | type | Callable[..., Any]) -> str:
    """Print what a rule selects by, so that `parse_select` reads it back where it has an importable name.

    Args:
        select: a glob, a class or a function.

    Returns:
        The text; a function or class without an importable name in angle brackets.

    >>> print_select("*.norm"), print_select("a b"), print_select(lambda n, m: True)
    ('*.norm', '"a b"', 'function:<lambda>')
    """
    if isinstance(select, str):
        return select if _PLAIN_GLOB.fullmatch(select) else json.dumps(select)
    home = getattr(select, "__module__", None) or type(select).__module__
    path = getattr(select, "__qualname__", None) or type(select).__qualname__
    found: Any = sys.modules.get(home)
    for part in path.split("."):
        found = getattr(found, part, None)
    kind, join = ("class", ".") if isinstance(select, type) else ("function", ":")
    if found is select:
        return f"{kind}:{home}{join}{path}"
    return f"{kind}:<{path.rpartition('.')[2].strip('<>')}>"


def read_flag(fields: Mapping[str, str], key: str) -> bool | None:
    """Read a field that is true or false.

    Args:
        fields: values by full key.
        key: which one.

    Returns:
        The flag, or None where it is not given.

    Raises:
        PolicyError: it is neither.

    >>> read_flag({"strict": "false"}, "strict"), read_flag({}, "strict")
    (False, None)
    """
    if key not in fields:
        return None
    if fields[key].lower() not in ("true", "false"):
        raise PolicyError(message(f"true or false for {key}", f"{key}={fields[key]}", remedy="write true or false"))
    return fields[key].lower() == "true"


def read_toml(source: str | Path) -> dict[str, Any]:
    """Read TOML from text or from a file.

    Args:
        source: a path, or text; a string with `=` in it is text.

    Returns:
        The table.

    Raises:
        PolicyError: it is not TOML, or Python is 3.10 and `tomli` is missing.

    >>> read_toml("preset = 'bf16-mixed'")
    {'preset': 'bf16-mixed'}
    """
    text = source if isinstance(source, str) and "=" in source else Path(source).read_text(encoding="utf-8")
    module = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        toml = importlib.import_module(module)
    except ImportError as error:
        raise PolicyError(
            message("a TOML reader", f"no module {module}", remedy="pip install tomli, or use Python 3.11 or newer")
        ) from error
    try:
        table: dict[str, Any] = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise PolicyError(message("a policy in TOML", f"{error}", remedy="write key = value lines")) from error
    return table


def quote(text: str) -> str:
    """Print a string as TOML does.

    Args:
        text: any string.

    Returns:
        It in double quotes, escaped.

    >>> quote('a "b"')
    '"a \\\\"b\\\\""'
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
