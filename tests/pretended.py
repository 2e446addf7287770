"""CUDA devices that are not there: tensors that say `cuda:0` or `cuda:1`, and have their values on the CPU.

To torch and to wrapprec they are CUDA tensors: CUDA's autocast lists, a thread of the autograd engine for each device,
CUDA's backend here. What a device would do beside computing is watched: each wait of the host is counted, with the
line that caused it, and operands on two devices are refused. Kernels, streams and memory are the CPU's.

The shared library of `build` must be loaded before torch is imported, into a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: Path) -> Path:
    """Compile what must be loaded first; nothing is imported for it.

    Args:
        folder: where the library is put.

    Returns:
        The library.
    """
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch, library = Path(spec.origin).parent, folder / "pretended.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    links = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(library), *links], check=True, capture_output=True, text=True)
    return library


if "WRAPPREC_PRETENDED" in os.environ:
    import ctypes

    ctypes.CDLL(os.environ["WRAPPREC_PRETENDED"])

    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
    from torch.utils._pytree import tree_leaves, tree_map

    aten = torch.ops.aten

    # The host gets a number, or a shape that depends on numbers.
    _READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero"}
    # Their kernels take no number from the host in place of a tensor on the device.
    _STRICT = ("cat", "stack", "_foreach_", "_fused_", "_amp_foreach_")

    class OnTwoDevices(RuntimeError):
        """Operands of one kernel are not on one device."""

    class Wait(SimpleNamespace):
        """The host waited for a device: `what` did it, at the line `where` of wrapprec or of its caller."""

        what: str
        where: str

    waits: list[Wait] = []

    def _waited(what: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        frames = [frame for frame in frames if frame.filename != __file__]
        # The engine's own threads run no Python but ours.
        where = f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "backward"
        waits.append(Wait(what=str(what), where=where))

    class Pretended(Tensor):
        """A tensor on a device that is not there; `values` are its numbers."""

        values: Tensor

        @staticmethod
        def __new__(cls, values: Tensor, device: torch.device) -> Any:
            tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                layout=values.layout,
                device=device,
            )
            tensor.values = values
            return tensor

        def __repr__(self) -> str:  # type: ignore[override]
            return f"Pretended({self.device}, {tuple(self.shape)}, {self.dtype})"

        @property
        def data(self) -> Any:  # type: ignore[override]
            """The same numbers, unknown to autograd."""
            return Pretended(self.values, self.device)

        @data.setter
        def data(self, other: Any) -> None:
            Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
            self.values = other.values

        def tolist(self) -> Any:
            """Read all numbers in one transfer, as torch does; it refuses a subclass."""
            return self.cpu().tolist()

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return _run(func, args, kwargs or {})

    class Cards(TorchDispatchMode):
        """While entered, what is made on `cuda` is made on a device that is not there."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return _run(func, args, kwargs or {})

    def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        there = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Pretended)]
        if not there and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        if wanted is not None and wanted.type == "cuda" and wanted.index is None:
            wanted = torch.device("cuda", 0)
        if name in {"_to_copy", "copy_"}:
            _check_copy(name, args, kwargs, wanted)
        else:
            _check(name, args, kwargs)
        if name in _READS:
            _waited(name)
        if name == "_fused_sdp_choice":
            return 0  # the one that is made of plain operations
        if name.startswith("_amp_foreach") and any(t.dtype is torch.bfloat16 for t in args[0]):
            raise NotImplementedError(f"{name} not implemented for 'BFloat16'")  # as on CUDA (torch 2.13)
        if name == "_scaled_mm":
            _check_float8(*args[:2])
        device = wanted or next(iter(t.device for t in there))
        plain = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        if wanted is not None:
            plain["device"] = torch.device("cpu")
        inner = tree_map(lambda t: t.values if isinstance(t, Pretended) else t, (args, plain))
        made = func(*inner[0], **inner[1])
        if name == "_to_copy" and wanted is not None and made is args[0]:
            made = made.clone()
        if device.type != "cuda":
            return made
        out = tree_map(lambda t: Pretended(t, device) if isinstance(t, Tensor) else t, made)
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _check(name: str, args: Any, kwargs: Any) -> None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        strict = name.startswith(_STRICT)
        # A number from the host may be an operand: its value is an argument of the kernel.
        devices = {t.device for t in tensors if strict or t.dim() > 0 or t.device.type != "cpu"}
        if name.startswith("_foreach_"):
            # They take lists from several devices, each position from one; then they are not one kernel.
            lists = [one for one in args if isinstance(one, (list, tuple)) and isinstance(one[0], Tensor)]
            devices = max(({t.device for t in row} for row in zip(*lists, strict=False)), key=len, default=set())
        if len(devices) > 1:
            raise OnTwoDevices(f"{name}: {sorted(map(str, devices))}")

    def _check_float8(a: Tensor, b: Tensor) -> None:
        # What CUDA's kernel asks of its operands, and the CPU's does not.
        if a.stride(-1) != 1 or b.stride(0) != 1:
            raise RuntimeError(
                "_scaled_mm: expected rows of the first and columns of the second operand to be contiguous"
            )
        if a.shape[1] % 16 or b.shape[0] % 16 or b.shape[1] % 16:
            raise RuntimeError(f"_scaled_mm: sizes {tuple(a.shape)} and {tuple(b.shape)} are no multiples of 16")
        if torch.float8_e4m3fn not in (a.dtype, b.dtype):
            raise RuntimeError("_scaled_mm: not two operands of e5m2")

    def _check_copy(name: str, args: Any, kwargs: Any, wanted: torch.device | None) -> None:
        source, target = (args[0], wanted) if name == "_to_copy" else (args[1], args[0].device)
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if target is None or source.device.type == target.type:
            return
        if target.type == "cpu" and asynchronous:
            raise RuntimeError("a copy to the host that nobody waits for, and is read before it is there")
        if not asynchronous:
            _waited(f"{name} from {source.device} to {target}")

    @contextlib.contextmanager
    def cards(capability: tuple[int, int] = (9, 0)) -> Iterator[list[Wait]]:
        """Two devices of a compute capability; what `torch.cuda` says of them is theirs.

        Yields:
            The waits of the host so far: clear it before what must not wait.
        """
        about = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: 0,
            "is_current_stream_capturing": lambda: False,
            "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0),
            "get_device_capability": lambda device=None: capability,
            "get_device_properties": lambda device=None: SimpleNamespace(major=capability[0], minor=capability[1]),
            "_lazy_init": lambda: None,
        }
        before = {name: getattr(torch.cuda, name) for name in about}
        for name, answer in about.items():
            setattr(torch.cuda, name, answer)
        waits.clear()
        # `Module.to` would put the new tensor's insides into the old object, and leave its numbers behind.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with Cards():
                yield waits
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            for name, answer in before.items():
                setattr(torch.cuda, name, answer)
