"""Writes what the zoo found: a table for people, and one line of JSON a class."""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

from zoo.case import MODES, POLICIES, verdict

Record = dict[str, Any]

_CAUSES: list[tuple[str, str]] = [
    # What an error's text is about, in words; the first that matches.
    (r"LSTM forward|primitive descriptor", "torch has no float16 LSTM on CPU (oneDNN)"),
    (r"without overflow", "a mask is filled with a number that the dtype does not hold"),
    (r"the loss is (nan|inf)", "the forward leaves float16's range: nan or inf in the loss at any loss scale"),
    (r"tries, \d steps", "gradients leave float16's range at any loss scale"),
    (r"AmbiguousGlobal", "a config object that refuses to be read"),
    (r"ScaleLeakError", "ScaleLeakError"),
    (r"DtypeMismatchError", "DtypeMismatchError, whose remedy is a float32 rule for the module it names"),
    (r"the loss differs", "the loss differs"),
]


def cause(reason: str) -> str:
    """A reason in a few words."""
    return next((words for pattern, words in _CAUSES if re.search(pattern, reason)), reason.partition(":")[0])


def forget_failures(folder: Path) -> None:
    """Take the records of classes that did not pass everywhere, or crashed, out of the results."""
    for path in folder.glob("*.jsonl"):
        kept = []
        for line in path.read_text().splitlines():
            record = json.loads(line)
            bad = "crashed" in record or ("modes" in record and any(verdict(record, mode) for mode in POLICIES))
            if not bad and not record.get("done") and "begun" not in record:
                kept.append(line)
        path.write_text("".join(line + "\n" for line in kept))


def write(records: list[Record], folder: Path) -> None:
    """Write `compatibility.md` and `compatibility/zoo.json` into a folder."""
    records = sorted(records, key=lambda r: (r["module"], r["class"]))
    (folder / "compatibility").mkdir(exist_ok=True)
    lines = [json.dumps(_short(r), sort_keys=True) for r in records if "modes" in r]
    (folder / "compatibility" / "zoo.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    (folder / "compatibility.md").write_text(page(records))


def _short(record: Record) -> Record:
    failed = {mode: cause(why) for mode in MODES if (why := verdict(record, mode)) is not None}
    losses = [float(f"{record['modes'][mode].get('loss', float('inf')):.1e}") for mode in MODES]
    short = {"module": record["module"], "class": record["class"], "inputs": record["inputs"]}
    return {**short, "off": [None if math.isinf(x) else x for x in losses], **({"failed": failed} if failed else {})}


def page(records: list[Record]) -> str:
    """The text of compatibility.md."""
    ran = [r for r in records if "modes" in r]
    head = _HEAD.format(
        classes=len(records),
        trained=len(ran),
        types=len({r["module"].partition(".")[0] for r in ran}),
        crashed=sum("crashed" in r for r in records),
        torch=torch.__version__,
        transformers=transformers.__version__,
        cpu=_cpu(),
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
    )
    return "\n".join(
        [head, _totals(ran), _FAILURES, _failures(ran), _PASSES, _passes(ran), _UNBUILT, _unbuilt(records)]
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    flags = [f for f in ("avx512_bf16", "avx512_fp16", "amx_bf16") if info.exists() and f in info.read_text()]
    return f"{names[0] if names else platform.machine()} ({', '.join(flags) or 'no low precision instructions'})"


def _totals(ran: list[Record]) -> str:
    rows = ["| | pass | of | share | losses within 1e-3 | gradient further off than 0.1 and three times autocast's |"]
    rows.append("|---|---|---|---|---|---|")
    for mode in MODES:
        good = sum(verdict(r, mode) is None for r in ran)
        close = sum(r["modes"][mode].get("loss", 1.0) <= 1e-3 for r in ran)
        far = sum(_is_far(r, mode) for r in ran) if mode in POLICIES else "-"
        rows.append(f"| `{mode}` | {good} | {len(ran)} | {good / len(ran):.1%} | {close} | {far} |")
    return "\n".join(rows) + "\n"


def _is_far(record: Record, mode: str) -> bool:
    rival = record["modes"]["autocast-bf16" if mode.startswith("bf16") else "autocast-f16"].get("grad", 0.0)
    return bool(record["modes"][mode].get("grad", 0.0) > max(0.1, 3 * rival))


def _failures(ran: list[Record]) -> str:
    grouped: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for record in ran:
        whys: dict[str, list[str]] = defaultdict(list)
        for mode in MODES:
            why = verdict(record, mode)
            if why is not None:
                whys[_in_words(why)].append(mode)
        for words, modes in whys.items():
            kind = record["module"].partition(".")[0]
            grouped[kind, words, ", ".join(f"`{mode}`" for mode in modes)].append(record["class"])
    rows = ["| classes | where | why |", "|---|---|---|"]
    rows += [f"| {', '.join(names)} | {modes} | {words} |" for (_, words, modes), names in sorted(grouped.items())]
    return "\n".join(rows) + "\n"


def _in_words(why: str) -> str:
    words = cause(why)
    found = re.search(r'Where: "[^"]*" \((\w+)\)', why)
    if found:
        return f"{words}: {found.group(1)}"
    return why if words == "the loss differs" else words


def _passes(ran: list[Record]) -> str:
    grouped: dict[str, list[str]] = defaultdict(list)
    for record in ran:
        if all(verdict(record, mode) is None for mode in POLICIES):
            grouped[record["module"].partition(".")[0]].append(record["class"])
    return "\n".join(f"- **{kind}**: {', '.join(names)}" for kind, names in sorted(grouped.items())) + "\n"


def _unbuilt(records: list[Record]) -> str:
    count = Counter(r["module"].partition(".")[0] for r in records if "modes" not in r)
    return ", ".join(f"{kind} ({number})" for kind, number in sorted(count.items())) + "\n"


_HEAD = """# Compatibility

What was tried: small random-config versions of the model classes of transformers, two training steps each.

**Limits first.**

- These are tiny models (below 2 M parameters, mostly below 0.3 M, two layers, 12 tokens or 64 pixels) with random
  weights. That they train says that no operation fails and that gradients are true; it says nothing about convergence.
- {trained} of the {classes} classes that transformers defines could be built and trained in float32 by the generic
  rules of `tests/zoo`; the others are counted at the end ({crashed} of them crashed or ran out of time). Multimodal
  models whose images need a matching count of image tokens run on text alone.
- Everything here ran eagerly on a CPU. Nothing is said about CUDA, whose autocast keeps other operations in float32.
- Two steps cannot show a slow drift. Dropout is off, so that runs can be compared.

How: `tox -e zoo`, which runs `python -m zoo` in `tests` and writes this page and [zoo.json](compatibility/zoo.json).
Python {python}, torch {torch}, transformers {transformers}, {cpu}; {date}; one thread a process.

For each class: float32, `torch.autocast` (under float16 with `torch.amp.GradScaler`), and wrapped in four policies,
from the same weights and inputs. SGD, learning rate 0.05, gradients clipped to norm 1 before the step; a step that is
skipped for an overflow, by GradScaler or by wrapprec, is taken again, until two have been taken. The loss is the
model's own where it computes one, or else a weighted mean of its outputs.

A wrapped model **passes** when it trains, exactly the same parameters have gradients as in float32, and the losses of
both steps differ from float32's by no more than 5e-3 (1e-2 under module casting), or three times what autocast's
differ; relative for losses above 1, absolute below. Autocast passes when it trains with the same gradients present.

{types} model types, {trained} classes:
"""

_FAILURES = """## What does not pass
"""
_PASSES = """## What passes in all four policies
"""
_UNBUILT = """## What could not be built from a generic small config, or is larger than 2 M parameters

By model type, with the number of classes:
"""
