"""`wrapprec run` in processes of its own: everything that a script can see is as under `python script.py`."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import wrapprec
from wrapprec import cli
from wrapprec.migrate.clock import Clock, where
from wrapprec.migrate.script import Program, execute, strip

ROOT = Path(wrapprec.__file__).parent.parent
PYTHON = [sys.executable]
RUN = [sys.executable, "-m", "wrapprec", "run", "--policy", "bf16-mixed"]


def _start(folder: Path, command: list[str], stdin: str = "") -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, cwd=folder, input=stdin, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    return done.returncode, done.stdout, done.stderr


def _both(folder: Path, command: list[str], stdin: str = "") -> list[tuple[int, str, str]]:
    """Alone and run, at the same time: most of it is the import of torch, on a core each."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda start: _start(folder, [*start, *command], stdin), (PYTHON, RUN)))


def _ours(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("wrapprec: ")]


FACTS = """
from __future__ import annotations
import atexit, pickle, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return float(index), type(self).__module__

def train(rank, slope):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=slope)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()

if __name__ == "__main__":
    print(sys.argv, sys.path[0], __name__, __file__, __spec__, __package__, __builtins__)
    print(sorted(name for name in globals() if name.startswith("__")))
    print(sys.stdin.read(), type(pickle.loads(pickle.dumps(Data()))), sys.modules["__main__"].Data is Data)
    for numbers, names in DataLoader(Data(), batch_size=4, num_workers=1, multiprocessing_context="spawn"):
        print(numbers, names)
    torch.multiprocessing.spawn(train, args=(0.5,), nprocs=2)
    atexit.register(print, "the last")
    sys.exit(7)
"""


def test_script_sees_what_it_would_see_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script.py").write_text(FACTS)
    command = [str(Path("folder") / "script.py"), "--policy", "x", "-m"]
    alone, (code, out, err) = _both(tmp_path, command, "typed")
    assert (code, out) == (7, alone[1]) and alone[0] == 7 and "'__mp_main__'" in out and "the last" in out
    # What torch.multiprocessing started found its model too, and one process of two says so.
    assert _ours(err) == [
        "wrapprec: wrapped Linear (3 parameters, SGD): bf16-mixed, skipped steps 0, final loss scale none"
    ]


def _in_process(monkeypatch: pytest.MonkeyPatch, program: Program) -> dict[str, Any]:
    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, ["what the interpreter put there", *getattr(sys, name)])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    code, main = program.load()
    execute(code, main)
    return main.__dict__


SEEN = """
import sys
seen = sys.argv, sys.path[0], __name__, __file__, __spec__ and __spec__.name, __package__, __annotations__, __cached__
print(repr(seen))
"""


def test_modules_folders_and_standard_input_run_as_after_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "wrapprec_test_package"
    package.mkdir()
    for part in ("__init__.py", "__main__.py", "part.py"):
        (package / part).write_text(SEEN if part != "__init__.py" else "")
    monkeypatch.chdir(tmp_path)
    name = package.name
    for target, is_module in [(name, True), (f"{name}.part", True), (name, False), (f"{name}/part.py", False)]:
        flags = ["-m"] if is_module else []
        alone = _start(tmp_path, [*PYTHON, *flags, target, "x"])[1]
        capsys.readouterr()
        with monkeypatch.context() as patch:
            _in_process(patch, Program(target, is_module, ("x",)))
        assert alone and capsys.readouterr().out == alone, target
    monkeypatch.setattr(sys, "stdin", io.StringIO(SEEN))
    _in_process(monkeypatch, Program("-", False, ("x",)))
    assert capsys.readouterr().out == _start(tmp_path, [*PYTHON, "-", "x"], SEEN)[1]


def test_source_is_read_in_its_own_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_bytes(
        "# coding: latin-1\nword = 'caf\u00e9'\nfuture = (lambda x: x).__annotations__\n".encode("latin-1")
    )
    assert _in_process(monkeypatch, Program(str(script), False, ()))["word"] == "caf\u00e9"


FAILS = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x):
        if x.sum() > 2:
            raise ZeroDivisionError("in forward")
        return self.layer(x)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=1)
model(torch.ones(1, 2)).sum().backward()
import logging, threading, traceback
try:
    model(torch.ones(2, 2))
except ZeroDivisionError:
    traceback.print_exc()
    logging.exception("said")
thread = threading.Thread(target=model, args=(torch.ones(2, 2),), name="T")
thread.start()
thread.join()
try:
    model(torch.ones(2, 2))
except ZeroDivisionError:
    model(torch.ones(3, 2))
"""


def test_traceback_is_the_scripts_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FAILS)
    alone, (code, _, err) = _both(tmp_path, ["script.py"])
    shown = "\n".join(line for line in err.splitlines() if not line.startswith("wrapprec: ")) + "\n"
    # Printed, logged, of a thread, the last one and the one before.
    assert code == alone[0] == 1 and shown.count("ZeroDivisionError: in forward") == 5 and shown == alone[2]
    assert len(_ours(err)) >= 1


def test_script_that_does_not_compile_ends_as_under_python(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = (\n")
    alone, (code, _, err) = _both(tmp_path, ["broken.py"])
    assert (code, err) == (1, alone[2])


def test_interrupt_and_own_excepthook_are_the_scripts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, seen = tmp_path / "script.py", []
    script.write_text("raise KeyboardInterrupt")
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "path", ["x", *sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "excepthook", lambda *given: seen.append(given))
    code, main = Program(str(script), False, ()).load()
    with pytest.raises(KeyboardInterrupt) as raised:
        execute(code, main)
    sys.excepthook(raised.type, raised.value, raised.tb)
    [(kind, error, trace)] = seen
    assert kind is KeyboardInterrupt and error.__traceback__ is trace
    assert [frame.name for frame in traceback.extract_tb(trace)] == ["<module>"]


def test_frames_of_a_defect_of_ours_are_kept() -> None:
    def raised(function: Any) -> tuple[BaseException, list[str]]:
        with pytest.raises(Exception) as found:  # of any kind
            function()
        trace = strip(found.value, found.value.__traceback__)
        return found.value, [frame.filename for frame in traceback.extract_tb(trace)]

    _, files = raised(lambda: wrapprec.wrap(nn.Linear(2, 2), policy="floaty"))
    assert not any(str(ROOT / "wrapprec") in file for file in files) and files
    _, files = raised(lambda: wrapprec.resolve(3))  # type: ignore[arg-type]  # an AttributeError from inside
    assert any(str(ROOT / "wrapprec") in file for file in files)


@pytest.mark.parametrize("arguments", [["--policy", "floaty", "x.py"], [], ["--policy"]])
def test_command_that_cannot_be_understood_ends_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", *arguments])
    assert ended.value.code == 2 and "usage: wrapprec run" in capsys.readouterr().err


def test_commands_are_listed_and_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ([["--help"], 0], [["--version"], 0], [[], 2], [["fly"], 2]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == code
    shown = capsys.readouterr().out
    assert wrapprec.__version__ in shown
    for command in cli.COMMANDS:
        assert command in shown
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0 and f"usage: wrapprec {command}" in capsys.readouterr().out


# Launchers

TRAINS = """
import os, time, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
torch.manual_seed(dist.get_rank())
for _ in range(6):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
total = sum(param.double().sum() for param in model.parameters())
# In one piece: both processes write to one pipe.
os.write(1, f"total {dist.get_rank()} {total.item():.6f}\\n".encode())
# The model keeps the group, and gloo's threads let go of tensors a moment later: while Python exits, that aborts it.
dist.barrier()
time.sleep(0.1)
dist.destroy_process_group()
"""


def _by_hand() -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for _ in range(6):
        losses = [model(torch.randn(8, 4, generator=generator)).square().mean() for generator in generators]
        grads = torch.autograd.grad((losses[0] + losses[1]) / 2, [*model.parameters()])
        with torch.no_grad():
            for param, grad in zip(model.parameters(), grads, strict=True):
                param -= 0.3 * grad
    return sum(param.double().sum().item() for param in model.parameters())


def test_torchrun_starts_it_and_one_rank_speaks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRAINS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    code, out, err = _start(tmp_path, [*torchrun, "-m", "wrapprec", "run", "--policy", "bf16-mixed", "script.py"])
    assert code == 0, err
    totals = [float(line.split()[-1]) for line in out.splitlines() if "total" in line]
    # Three steps of bfloat16; without the other rank's gradients it is off by 0.03 and more.
    assert len(totals) == 2 and totals[0] == totals[1] and abs(totals[0] - _by_hand()) < 0.01
    assert [line for line in _ours(err) if "wrapped DistributedDataParallel" in line] == _ours(err)[:1]


def test_accelerate_starts_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "script.py").write_text(
        "from accelerate import Accelerator\nimport torch\nfrom torch import nn\n"
        "accelerator = Accelerator()\nmodel = nn.Linear(4, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "model, optimizer = accelerator.prepare(model, optimizer)\n"
        "accelerator.backward(model(torch.ones(2, 4)).sum())\noptimizer.step()\nprint('done')\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--mixed_precision"]
    code, out, err = _start(tmp_path, [*launch, "no", "-m", "wrapprec", "run", "--policy", "bf16-mixed", "script.py"])
    assert (code, "done" in out) == (0, True), err
    assert any("wrapped Linear (5 parameters, SGD): bf16-mixed" in line for line in _ours(err))


# Processes

WORKERS = """
import concurrent.futures, multiprocessing, sys
import torch
from torch import nn

def train(rank, out):
    torch.manual_seed(rank)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.full((1, 2), 1.01)).sum()
    loss.backward()
    optimizer.step()
    if out is not None:
        out.put(loss.item())
    return loss.item()

class Trainer(multiprocessing.Process):
    def run(self):
        train(1, None)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    out = context.Queue()
    one = context.Process(target=train, args=(0, out), name="first")
    one.start()
    print("%.6f" % out.get())
    one.join()
    if sys.argv[1] == "fork":
        two = Trainer(name="second")
        two.start()
        two.join()
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            print("%.6f" % pool.submit(train, 2, None).result())
"""


def _loss_by_hand(seed: int) -> float:
    torch.manual_seed(seed)
    layer = nn.Linear(2, 1)
    return (layer.weight.sum() * 1.01 + layer.bias).item()


@pytest.mark.parametrize(("method", "ranks"), [("fork", [0, 2]), ("spawn", [0])])
def test_processes_of_plain_multiprocessing_find_their_models(tmp_path: Path, method: str, ranks: list[int]) -> None:
    (tmp_path / "script.py").write_text(WORKERS)
    code, out, err = _start(tmp_path, [*RUN, "script.py", method])
    assert code == 0, err
    got, want = [float(line) for line in out.split()], [_loss_by_hand(rank) for rank in ranks]
    # Two products of numbers of order one, each rounded to 8 bits.
    assert got == pytest.approx(want, abs=0.02) and got != pytest.approx(want, abs=2e-6)
    first, *rest = _ours(err)
    wrapped = "wrapped Linear (3 parameters, SGD): bf16-mixed, skipped steps 0, final loss scale none"
    assert first == f"wrapprec: first: {wrapped}"
    assert [line for line in rest if line.endswith(wrapped)] == rest[:-1] and len(rest) == (
        3 if method == "fork" else 1
    )
    assert rest[-1].endswith("was seen in this process: nothing was wrapped")


def test_dry_run_prints_one_plan_for_ranks_that_are_alike(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        WORKERS.partition("if __name__")[0] + "if __name__ == '__main__':\n"
        "    torch.multiprocessing.start_processes(train, (None,), nprocs=2, start_method='fork')\n"
    )
    code, out, err = _start(tmp_path, [*RUN[:-2], "--policy", "bf16-mixed", "--dry-run", "script.py"])
    assert code == 0 and out.count("Linear") == 1, err


# The clock


class _Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(where(sys._getframe()))
        return self.layer(x)  # type: ignore[no-any-return]


def test_clock_tells_precisions_apart() -> None:
    model = nn.Sequential(_Looks(), _Looks())
    wrapprec.wrap(model, policy="bf16-mixed", rules=[("1", "float32")])
    seen: list[str] = []
    out = model(torch.ones(1, 2))
    out.register_hook(lambda grad: seen.append(where(sys._getframe())))
    out.sum().backward()
    assert [layer.seen for layer in model] == [["forward in bfloat16"], ["forward in float32"]]
    assert seen == ["backward"] and where(sys._getframe()) == "elsewhere"

    class Steps(torch.optim.SGD):
        pass

    optimizer = Steps(model.parameters(), lr=0.1)
    frames: list[FrameType] = []
    optimizer.register_step_pre_hook(lambda *_: frames.append(sys._getframe()))
    optimizer.step()
    assert where(frames[0].f_back) == "optimizer"


class _Kept:
    pass


def test_clock_keeps_nothing_alive_and_is_gone_when_it_is_stopped() -> None:
    def looked_at() -> weakref.ref[_Kept]:
        kept, before = _Kept(), sum(clock.counts.values())
        while sum(clock.counts.values()) < before + 2:
            time.sleep(0.002)
        return weakref.ref(kept)

    clock = Clock()
    clock.start()
    refs = [looked_at()() for _ in range(5)]
    clock.stop()
    assert refs == [None] * 5
    # A thread that is left behind aborts the process now and then, when it wakes up while the interpreter ends.
    assert all(thread.name != "wrapprec-clock" for thread in threading.enumerate())


def test_clock_looks_at_the_thread_that_started_it() -> None:
    clock = Clock()
    clock.start()
    clock.start()
    while sum(clock.counts.values()) < 3:
        torch.ones(100).sum()
    clock.stop()
    assert str(clock).startswith("elsewhere ") and str(clock).endswith("%")


def test_clock_looks_at_other_threads_where_its_own_waits() -> None:
    """As under nn.DataParallel: the thread that starts the replicas waits for them."""

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while not done.is_set():
                time.sleep(0.001)
            return x

    done, model = threading.Event(), nn.Sequential(nn.Linear(2, 2), Slow())
    wrapprec.wrap(model, policy="bf16-mixed")
    replica = threading.Thread(target=model, args=(torch.ones(1, 2),))
    replica.start()
    clock = Clock()
    clock.start()
    while sum(clock.counts.values()) < 3:
        time.sleep(0.002)
    done.set()
    replica.join()
    clock.stop()
    assert clock.counts["forward in bfloat16"] >= 2
