"""Every example runs at small size, as a user runs it: a program of its own, whose output says what it promises."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="only a checkout has the examples")


def _command(name: str, *arguments: str) -> list[str]:
    # Warnings of wrapprec about a policy are the examples' to show, others are mistakes of theirs.
    return [sys.executable, "-W", "error::DeprecationWarning:__main__", str(EXAMPLES / name), "--small", *arguments]


def _run(folder: Path, name: str, *arguments: str) -> str:
    done = subprocess.run(
        _command(name, *arguments), cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {
        "quickstart.py",
        "per_module_policy.py",
        "gan.py",
        "gpt.py",
        "benchmark.py",
        "distributed.py",
        "sharded.py",
        "fp8.py",
        "tpu.py",
        "optimizer_bits.py",
        "finetune_4bit.py",
        "true_half.py",
    }


def test_quickstart_prints_plan_table_and_the_one_line_diff(tmp_path: Path) -> None:
    out = _run(tmp_path, "quickstart.py")
    assert "default: normalisation" in out
    for way in ("plain FP32", "torch.amp by hand", "wrapprec"):
        row = re.search(rf"│ {re.escape(way)} +│ +[\d.]+% │ +[\d.]+ │ +(\d+ MB|-) │ +0 │", out)
        assert row, out
    diff = out.partition("The one-line diff")[2]
    changed = [line.rstrip() for line in diff.splitlines() if line.startswith(("+", "-"))]
    assert changed == ["+handle = wrapprec.wrap(model, optimizer, policy)"]


@pytest.mark.parametrize("policy", ["bf16-module", "16-mixed"])
def test_per_module_policy_shows_errors_and_plan(tmp_path: Path, policy: str) -> None:
    out = _run(tmp_path, "per_module_policy.py", "--policy", policy)
    errors = [float(value) for value in re.findall(r"\d\.\de[-+]\d\d", out)]
    assert len(errors) == 5
    assert errors[-1] <= errors[0] < 0.1  # every Linear in float32, against none; eight bits of mantissa or more
    assert 'rule 2: "head"' in out


def test_fp8_shows_the_plan_and_each_recipe(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    out = _run(tmp_path, "fp8.py")
    assert "default: first Linear" in out and "not fp8: out_features=10 is no multiple of 16" in out
    errors = [float(value) for value in re.findall(r"^\S+-mixed\S* +(0\.\d+) ", out, re.MULTILINE)]
    # bfloat16, then the recipes: two bits of mantissa or three in the gradients, or bfloat16 in those of the weights.
    assert len(errors) == 4 and errors[0] < 0.02 < errors[3] < errors[1] < 0.2


@pytest.mark.parametrize("policy", ["bf16-mixed", "16-module"])
def test_gan_trains_two_models_with_a_scale_each(tmp_path: Path, policy: str) -> None:
    out = _run(tmp_path, "gan.py", "--policy", policy)
    scales = re.findall(r"loss scales (\S+), (\S+)", out)[-1]
    assert scales == (("1", "1") if policy == "bf16-mixed" else ("65536", "65536"))
    assert "nan" not in out


@pytest.mark.parametrize("policy", ["bf16-module", "16-mixed"])
def test_distributed_trains_two_processes_to_the_same_weights_and_scale(tmp_path: Path, policy: str) -> None:
    pytest.importorskip("accelerate")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(EXAMPLES / "distributed.py"), "--small", "--policy", policy]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"2 processes under {policy}, accuracy" in done.stdout
    assert "weights and scale are the same everywhere: True" in done.stdout
    assert "saved custom_checkpoint_0.pkl, " in done.stdout or policy == "bf16-module"


@pytest.mark.parametrize("policy", ["bf16-mixed", "16-module"])
def test_sharded_trains_two_processes_to_the_same_scale(tmp_path: Path, policy: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(EXAMPLES / "sharded.py"), "--small", "--policy", policy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.search(rf"2 processes under {policy}, accuracy ([0-9.]+)%", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 80  # one in ten by chance
    # Half of each weight and bias: all have an even number of rows.
    assert "this one holds 5,461 of 10,922 weights" in done.stdout, done.stdout
    assert "the same everywhere, and after loading: True" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to one process there")
@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed"])
def test_gpt_that_was_interrupted_and_resumed_ends_with_the_same_bits(tmp_path: Path, policy: str) -> None:
    arguments = ["--policy", policy, "--steps", "240"]
    whole = _run(tmp_path, "gpt.py", *arguments, "--checkpoint", "whole.pt")
    with subprocess.Popen(
        _command("gpt.py", *arguments, "--checkpoint", "parts.pt"), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("step    20"):
                running.send_signal(signal.SIGINT)
            last = line
    assert last.startswith("stopped after step"), last
    resumed = _run(tmp_path, "gpt.py", *arguments, "--checkpoint", "parts.pt", "--resume")
    assert "resumed after step" in resumed
    ends = [out.partition("fingerprint")[2] for out in (whole, resumed)]
    assert len(ends[0]) > 40  # the hash, and the text that was written after it
    assert ends[0] == ends[1]


@pytest.mark.parametrize("policy", ["nf4-dq", "int8"])
def test_finetune_on_quantised_weights_ends_near_float32_with_less_memory(tmp_path: Path, policy: str) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("transformers")
    out = _run(tmp_path, "finetune_4bit.py", "--policy", policy)
    rows = re.findall(r"LoRA, (\S+) +([\d,]+) B +([\d,]+) B +(\S+) +(\S+) ", out)
    assert [row[0] for row in rows] == ["32-true", policy]
    (full, kept), (also, packed) = ([int(row[i].replace(",", "")) for i in (1, 2)] for row in rows)
    assert full == kept == also and packed < (0.7 if policy == "int8" else 0.6) * full  # the embedding is not packed
    (plain_before, plain), (before, after) = ([float(row[i]) for i in (3, 4)] for row in rows)
    assert plain < plain_before and after < before
    assert abs(after - plain) < 0.05 * plain


def test_benchmark_writes_ratios_with_intervals_and_the_machine(tmp_path: Path) -> None:
    _run(tmp_path, "benchmark.py", "--jobs", "gpt")
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert {"cpu", "cores", "torch", "wrapprec", "date"} <= set(report["machine"])
    for row in report["gpt"]["time"].values():
        low, high = row["interval"]
        assert low <= row["ratio"] <= high
    assert report["gpt"]["time"]["autocast"]["ratio"] == 1.0
    assert report["gpt"]["memory"]["float32"]["megabytes"] > 0


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed: tox -e xla")
@pytest.mark.parametrize("policy", ["bf16-mixed", "16-module"])
def test_tpu_example_compiles_few_programs_and_reads_only_what_it_prints(tmp_path: Path, policy: str) -> None:
    out = _run(tmp_path, "tpu.py", "--policy", policy)
    losses = [float(value) for value in re.findall(r"loss (\d\S+)", out)]
    assert losses[-1] < losses[0]
    compiled, reads = re.search(r"(\d+) programs compiled, (\d+) host reads", out).groups()
    # The first step (zero_grad has nothing to do yet), the others, the sum of losses and the evaluation.
    assert int(compiled) <= 5 and int(reads) == len(losses) + 1


def test_true_half_shows_losses_and_bytes_of_each_rounding(tmp_path: Path) -> None:
    out = _run(tmp_path, "true_half.py")
    rows = {name: re.findall(rf"^{name} +(.*)$", out, re.MULTILINE) for name in ("32-true", "kahan", "stochastic")}
    losses = {name: [float(number) for number in found[0].split()] for name, found in rows.items()}
    # 20 steps: kahan differs from float32 by bfloat16 activations alone.
    assert losses["kahan"] != losses["32-true"]
    for mine, true in zip(losses["kahan"], losses["32-true"], strict=True):
        assert abs(mine / true - 1) < 0.01
    stored = {name: found[1].split()[0] for name, found in rows.items()}
    assert stored == {"32-true": "4.00", "kahan": "4.00", "stochastic": "2.00"}


def test_optimizer_bits_shows_a_quarter_of_the_state_and_the_same_loss(tmp_path: Path) -> None:
    out = _run(tmp_path, "optimizer_bits.py")
    rows = re.findall(r"^(\S.*?) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.MULTILINE)
    share = {name: float(share) for name, _, share, _, _ in rows}
    loss = {name: float(loss) for name, _, _, _, loss in rows}
    assert share["AdamW()"] == 1.0 and share["optimizer_bits=8"] <= 0.3 and share["optimizer_bits=4"] <= 0.15
    assert abs(loss["optimizer_bits=8"] / loss["AdamW()"] - 1) < 0.02
    assert loss["optimizer_bits=8"] != loss["AdamW()"]
