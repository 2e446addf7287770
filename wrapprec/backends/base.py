"""What a device type must be able to answer, and the parts that are the same on all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wrapprec.backends.bits import Bits
from wrapprec.backends.fast import Switches
from wrapprec.backends.float8 import Float8, advise
from wrapprec.backends.norms import NORMS, norm_kind, probe_norm
from wrapprec.backends.recording import Recording
from wrapprec.backends.recurrent import probe_rnn, rnn_kind
from wrapprec.errors import PolicyError, message
from wrapprec.precision import Precision


@dataclass(frozen=True)
class Capability:
    """What a device can do.

    Args:
        device_type: e.g. `cpu`.
        autocast_dtypes: what autocast can compute in there.
        fast_dtypes: what runs at least as fast as float32 there.
        scaling: whether float16 needs, and gets, a loss scale there.
        notes: what else a reader of the plan should know.
        mixed_norms: `(class name, dtype name)` of the norms that take activations of it with float32 parameters.
    """

    device_type: str
    autocast_dtypes: frozenset[torch.dtype]
    fast_dtypes: frozenset[torch.dtype]
    scaling: bool
    notes: tuple[str, ...]
    mixed_norms: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Lending:
    """How weights are lent.

    Args:
        bucket_elements: how many elements a bucket may hold; 0 makes one bucket of every module.
        multi_tensor: whether one multi-tensor pass beats a cast for each parameter.
    """

    bucket_elements: int
    multi_tensor: bool


class Backend(Recording, Bits, ABC):
    """A device type.

    Attributes:
        name: the device type.
        lending: how weights are lent there.
        scaling: whether float16 needs, and gets, a loss scale there.
        switches: what makes float32 products fast there (the policy `32-fast`); None where there is nothing.
        float8: what can be done with fp8 there; None where it is not computed, but bfloat16.
    """

    name: str
    lending: Lending
    scaling: bool = True
    switches: Switches | None = None
    float8: Float8 | None = None

    def __init__(self) -> None:
        self._probed: dict[tuple[str, torch.dtype, str], bool] = {}

    @abstractmethod
    def capability(self, device: torch.device) -> Capability:
        """Say what a device can do.

        Args:
            device: a device of this type.

        Returns:
            Its capability.
        """

    @abstractmethod
    def auto(self, device: torch.device) -> tuple[str, str]:
        """Choose the policy for a device.

        Args:
            device: a device of this type.

        Returns:
            The spelling of a preset, and the reason in a few words.
        """

    def native(self, precision: Precision) -> Precision:
        """Say in which precision a device computes what a policy asks for.

        Args:
            precision: the policy's or a rule's.

        Returns:
            The same, with the dtypes that the device does not have replaced by those it has instead.
        """
        return precision if self.float8 is not None else precision.surroundings

    def advise(self, precision: Precision, device: torch.device) -> str | None:
        """Say whether another precision would serve better on a device.

        Args:
            precision: what the policy asks for.
            device: a device of this type.

        Returns:
            The advice, to be given once; None where there is none.
        """
        return advise(precision, self.float8, device)

    def facts(self, precision: Precision, device: torch.device) -> str | None:
        """Say what a reader of the plan should know of a precision on a device.

        Args:
            precision: what the policy asks for.
            device: a device of this type.

        Returns:
            The fact, measured here; None where there is nothing to say.

        Raises:
            PolicyError: it asks for fast float32 products, and the device has no switch for them.
        """
        if precision.compute_dtype != "tf32":
            return None
        if self.switches is None:
            raise PolicyError(
                message(
                    "a device with a switch for fast float32 products (cpu, cuda)",
                    f"a policy that computes in tf32, on {device}",
                    remedy="use the policy 'bf16-mixed' or '32-true' there",
                )
            )
        plain, fast = self.switches.errors(device)
        return (
            f"float32 products by the faster road: relative error {fast:.1e} against float64, {plain:.1e} without;"
            " the switches hold for the whole process until unwrap"
        )

    def accepts_mixed_norm(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
        """Say whether a norm's kernel takes activations in `dtype` with float32 parameters, by trying it once.

        A fresh, tiny norm of the same kind is run forward and backward; the module itself is not touched, and
        neither are the random state, the gradient mode and autocast.

        Args:
            module: an instance of one of torch's normalisations.
            dtype: the dtype of the activations.
            device: where.

        Returns:
            True if it ran without an exception or a warning, answered in `dtype`, and differed from the float32
            result by rounding only.
        """
        kind = norm_kind(module)
        if kind is None:
            return False
        key = (kind, dtype, device.type)
        if key not in self._probed:
            self._probed[key] = probe_norm(kind, dtype, device)
        return self._probed[key]

    def runs_rnn(self, module: nn.Module, dtype: torch.dtype, autocasts: bool, device: torch.device) -> bool:
        """Say whether torch's kernel for a recurrent network runs in `dtype`, by trying a tiny one once.

        Args:
            module: any module.
            dtype: float16 or bfloat16.
            autocasts: whether it would run under autocast, or with weights and inputs cast to `dtype`.
            device: where.

        Returns:
            False for an RNN, GRU or LSTM that fails there or computes something else; True for every other module.
        """
        kind = rnn_kind(module)
        if kind is None:
            return True
        key = (f"{kind} autocast" if autocasts else kind, dtype, device.type)
        if key not in self._probed:
            self._probed[key] = probe_rnn(kind, dtype, autocasts, device)
        return self._probed[key]

    def mixed_norms(self, device: torch.device) -> frozenset[tuple[str, str]]:
        """List the norms that take low-precision activations with float32 parameters.

        Args:
            device: a device of this type.

        Returns:
            Pairs of class name and dtype name.
        """
        found = set()
        for kind, (make, arguments, _) in NORMS.items():
            for dtype in (torch.bfloat16, torch.float16):
                if self.accepts_mixed_norm(make(*arguments, device="meta"), dtype, device):
                    found.add((kind, str(dtype).removeprefix("torch.")))
        return frozenset(found)

    def read(self, *tensors: Tensor) -> list[float]:
        """Read one-element tensors on the host, all in one transfer; nothing else in wrapprec does.

        Args:
            tensors: each of one element, any dtype.

        Returns:
            Their values.
        """
        if not tensors:
            return []
        wide = any(t.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.bool) for t in tensors)
        dtype, device = torch.float64 if wide else torch.float32, tensors[0].device
        with torch.no_grad():
            values: list[float] = torch.stack([t.detach().reshape(()).to(device, dtype) for t in tensors]).tolist()
        return values
