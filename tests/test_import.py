"""The first line works before anything else is installed: `import wrapprec` needs torch alone, and is quick."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# What torch imports of its own accord is torch's business, so it comes first; then nothing third-party may follow.
_ALONE = """
import sys
import torch

class Missing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("torch", "wrapprec"):
            raise ModuleNotFoundError(f"wrapprec imported {name}", name=name)

sys.meta_path.insert(0, Missing())
import wrapprec
"""

# A step makes torch itself import more of what it depends on, so here only what it does without is missing.
_WORKS = """
import sys
for name in "numpy scipy sklearn rich accelerate bitsandbytes torchao libcst transformers tomli pytest".split():
    sys.modules[name] = None
import torch
import wrapprec
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
handle = wrapprec.wrap(model, optimizer, "bf16-mixed")
model(torch.ones(1, 4)).sum().backward()
optimizer.step()
print(handle)
"""

_TIMED = """
import time
import torch
start = time.process_time()
import wrapprec
print(time.process_time() - start)
"""


def _run(code: str) -> str:
    # Modules are compiled once, as those of an installed package are.
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_alone() -> None:
    _run(_ALONE)


def test_first_step_needs_torch_alone() -> None:
    assert "bf16-mixed" in _run(_WORKS)


def test_blocked_package_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="wrapprec imported rich"):
        _run(_ALONE + "import rich")


def test_import_adds_less_than_a_tenth_of_a_second_to_that_of_torch() -> None:
    # The best of five: the promise is about the work that importing is, not about who else uses the machine.
    assert min(float(_run(_TIMED)) for _ in range(5)) < 0.1
