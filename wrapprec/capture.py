"""A wrapped model in the hands of what records a graph: export, jit, fx, make_fx.

A recorded forward has the casts in it, and gives right numbers. The loss scale cannot be recorded: the borders act in
backward, which is not part of the graph, or would stay in it as a constant.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wrapprec import levels
from wrapprec.errors import CaptureError, message, module_label

if TYPE_CHECKING:
    from wrapprec.forward import Forward

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_symbolic() -> bool:
    """`torch.fx.symbolic_trace` runs: arguments are proxies without a dtype, and a module is called by its own name."""
    # Not imported here: that takes a while, and who has not imported it does not trace.
    symbolic: Any = sys.modules.get("torch.fx._symbolic_trace")
    return symbolic is not None and symbolic._is_fx_tracing_flag and torch._C._get_dispatch_mode(_PROXY) is None


def is_recording() -> bool:
    """make_fx, torch.export or `torch.jit.trace` runs: what a forward does is written down, operation by operation."""
    return torch._C._get_dispatch_mode(_PROXY) is not None or torch._C._get_tracing_state() is not None


def has_no_backward(forward: Forward) -> bool:
    """Say whether a graph without gradients is being recorded, where a loss scale would be on; refuse other graphs.

    Raises:
        CaptureError: a graph is being recorded that may be differentiated.
    """
    if forward.shared.backend.is_recording():
        forward.shared.backend.refuse_recording(
            "a policy without a loss scale, or none of its forwards with gradients in a graph that is replayed",
            "a forward under a loss scale: replays would keep the scale of this step, and their overflows go unseen",
            where=module_label(forward.name, forward.module),
            remedy="use a bf16 policy, of which forward, backward and step can be recorded",
        )
    if levels.differentiates_forward():
        # torch.func.linearize records how tangents go, and nothing else.
        return torch._C._get_dispatch_mode(_PROXY) is not None
    if torch._C._get_tracing_state() is not None:
        how = "torch.jit.trace"
    elif torch._C._get_dispatch_mode(_PROXY) is not None:
        how = "make_fx or AOTAutograd"
    else:
        return False
    if not torch.onnx.is_in_onnx_export():
        refuse_scale(how, module_label(forward.name, forward.module))
    return True


def refuse_scale(how: str, where: str) -> None:
    """Raise the error for a forward that is recorded with gradients on."""
    raise CaptureError(
        message(
            "a wrapped model to be recorded without gradients, where a loss scale is on",
            f"a call under {how} with gradients on: the recorded graph would lose the loss scale, or keep it for good",
            where=where,
            remedy="call wrapprec.unwrap(model), or unwrap a copy.deepcopy, before it is recorded; or record it under"
            " torch.no_grad(), to be run without gradients",
        )
    )


# Dynamo calls it as it is, so that the error comes out as it is. (What `torch.compiler.assume_constant_result` sets;
# that imports dynamo.)
refuse_scale._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Recorded:
    """What recorders look for on a function, on the `Forward` that stands in for one."""

    original: Any
    name: str
    module: nn.Module

    @property
    def __code__(self) -> Any:
        """The original's: torch.export names its graph after it."""
        return inspect.unwrap(self.original).__code__

    @property
    def __globals__(self) -> Any:
        # Nothing but torch.jit.script looks for it here.
        raise CaptureError(
            message(
                "a plain model for torch.jit.script",
                "a wrapped one, whose forward is no Python function",
                where=module_label(self.name, self.module),
                remedy="call wrapprec.unwrap(model), or unwrap a copy.deepcopy, before it is scripted",
            )
        )
