"""Runs the zoo: `python -m zoo` in the folder `tests`; what is in the results file already is not run again."""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SECONDS_A_CLASS = 90


def types() -> list[str]:
    """Every module of transformers that defines models, as `type.module`, found without importing any."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    return sorted(f"{path.parent.name}.{path.stem}" for path in root.glob("*/modeling_*.py"))


def _work(name: str, skip: set[str], path: str, modes: tuple[str, ...]) -> None:
    """In a process of its own: run the classes of one module, one line of results after the other."""
    import torch

    from zoo.case import classes, run

    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity(50)
    with open(path, "a") as out:

        def say(record: dict[str, Any]) -> None:
            out.write(json.dumps({"module": name, **record}) + "\n")
            out.flush()

        try:
            module = importlib.import_module(f"transformers.models.{name}")
        except Exception as error:
            say({"class": "", "skipped": f"import: {error}"[:200]})
            return
        for kind in classes(module):
            if kind.__name__ in skip:
                continue
            say({"class": kind.__name__, "begun": True})
            begun = time.time()
            record = run(kind, modes)
            record["seconds"] = round(time.time() - begun, 2)
            say(record)
        say({"class": "", "done": True})


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


class Job:
    """The process that works on one module."""

    def __init__(self, name: str, skip: set[str], path: Path, modes: tuple[str, ...]) -> None:
        self.name, self.path = name, path
        self.process = multiprocessing.get_context("fork").Process(
            target=_quiet, args=(name, skip, str(path), modes), daemon=True
        )
        self.size, self.since = -1, time.time()
        self.process.start()

    def alive(self) -> bool:
        """Whether it still works; one that has written nothing for too long is ended."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.size:
            self.size, self.since = size, time.time()
        if self.process.is_alive() and time.time() - self.since > SECONDS_A_CLASS:
            self.process.kill()
            self.process.join()
        return self.process.is_alive()


def _quiet(*args: Any) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    _work(*args)


def _todo(name: str, folder: Path) -> tuple[set[str], bool]:
    """The classes of a module that have a result, and whether all have. One that was begun only has crashed."""
    path = folder / f"{name}.jsonl"
    records = read(path)
    finished = {r["class"] for r in records if "begun" not in r and r["class"]}
    for record in records:
        if "begun" in record and record["class"] not in finished:
            finished.add(record["class"])
            with open(path, "a") as out:
                text = {"module": name, "class": record["class"], "crashed": "a crash, or more than the time allowed"}
                out.write(json.dumps(text) + "\n")
    return finished, any("done" in r or r["class"] == "" for r in records)


def drive(names: list[str], folder: Path, workers: int, modes: tuple[str, ...]) -> None:
    """Run the modules `names`, each in a process of its own that starts from this one's imports."""
    import torch
    from transformers import PreTrainedModel  # noqa: F401  # imported once, before the fork

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    waiting, jobs = list(names), list[Job]()
    while waiting or jobs:
        for job in [job for job in jobs if not job.alive()]:
            jobs.remove(job)
            if not _todo(job.name, folder)[1]:
                waiting.insert(0, job.name)
        while waiting and len(jobs) < workers:
            name = waiting.pop(0)
            finished, done = _todo(name, folder)
            if not done:
                jobs.append(Job(name, finished, folder / f"{name}.jsonl", modes))
        time.sleep(0.02)


def results(folder: Path) -> Iterator[dict[str, Any]]:
    """The result of every class, in order."""
    for path in sorted(folder.glob("*.jsonl")):
        for record in read(path):
            if record["class"] and "begun" not in record:
                yield record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression for model types")
    parser.add_argument("--folder", type=Path, default=Path("../.zoo"), help="where results are kept")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--modes", default="", help="comma separated; all by default")
    parser.add_argument("--again", action="store_true", help="run anew what did not pass")
    parser.add_argument("--docs", type=Path, help="the folder for compatibility.md and compatibility/zoo.json")
    given = parser.parse_args()
    from zoo.case import MODES
    from zoo.table import forget_failures, write

    if given.again:
        forget_failures(given.folder)
    chosen = [name for name in types() if re.search(given.only, name)]
    drive(chosen, given.folder, given.workers, tuple(given.modes.split(",")) if given.modes else MODES)
    if given.docs is not None:
        write(list(results(given.folder)), given.docs)
