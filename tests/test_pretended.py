"""The CUDA path on devices that are not there: values, waits of the host, and what lives on which device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pretended
import pytest
import torch
from pretended_checks import CHECKS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check raised, or nothing: all run in one process, into which the devices are loaded before torch."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    if torch.version.cuda is not None or torch.version.hip is not None or torch.__version__ < "2.13":
        pytest.skip("needs torch 2.13 or newer, for CPUs: one for CUDA asks the driver, and the headers change")
    library = pretended.build(tmp_path_factory.mktemp("pretended"))
    env = {**os.environ, "WRAPPREC_PRETENDED": str(library), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), env.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(HERE / "pretended_checks.py")], env=env, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", CHECKS)
def test_on_cuda_devices_that_are_not_there(name: str, found: dict[str, str]) -> None:
    assert not found[name], found[name]
