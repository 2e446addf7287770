"""Graphs of kernels that a device records once and replays (CUDA graphs): what must not be recorded, and is found."""

from __future__ import annotations

from typing import Any

import torch

from wrapprec.errors import CaptureError, message


class Recording:
    """What a backend knows about such graphs; most device types have none.

    Attributes:
        name: the device type.
    """

    name: str

    def is_recording(self) -> bool:
        """Say whether what is launched now on this thread's stream goes into a graph, to be replayed without Python.

        >>> from wrapprec.backends.cpu import CpuBackend
        >>> CpuBackend().is_recording()
        False
        """
        device: Any = getattr(torch, self.name, None)
        # Before the device has been used there is nothing to ask, and torch 2.13 without CUDA raises.
        begun = getattr(device, "is_initialized", None)
        asks = getattr(device, "is_current_stream_capturing", None)
        return asks is not None and begun is not None and bool(begun() and asks())

    def refuse_recording(self, expected: str, received: str, remedy: str, where: str | None = None) -> None:
        """Raise if a graph is being recorded.

        Args:
            expected: what may be recorded.
            received: what came instead, and what would be wrong in the replays.
            remedy: what to do about it.
            where: the qualified name of the module; None where there is none.

        Raises:
            CaptureError: a graph is being recorded.
        """
        if self.is_recording():
            received = (
                f"{received}, while {self.name} records a graph (torch.{self.name}.graph, make_graphed_callables)"
            )
            raise CaptureError(message(expected, received, where=where, remedy=remedy))


def beneath_graph(forward: Any, kind: type) -> Any:
    """Find what stands in a forward that `torch.cuda.make_graphed_callables` has put on a module.

    Args:
        forward: what the module's instance has as `forward`.
        kind: of the object to look for.

    Returns:
        The object of that kind for which the graph stands; None where there is none, or `forward` is no such graph.

    >>> beneath_graph(len, object) is None
    True
    """
    if not is_graph(forward):
        return None
    held = (cell.cell_contents for cell in forward.__closure__ or ())
    return next((one for one in held if isinstance(one, kind)), None)


def is_graph(forward: Any) -> bool:
    """Say whether a forward replays a graph of `torch.cuda.make_graphed_callables`.

    >>> is_graph(len)
    False
    """
    return getattr(forward, "__module__", None) == "torch.cuda.graphs"
