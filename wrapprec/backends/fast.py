"""The switches that let a device's float32 products take a faster road, and what that costs in accuracy."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Setting = tuple[Any, str, str]
"""An object, its attribute, and the value that makes float32 fast."""


class Switches:
    """The settings of one device type. They hold for the whole process: whoever comes last puts the old values back.

    What somebody has set otherwise since stays.

    Args:
        settings: what to set.
    """

    def __init__(self, *settings: Setting) -> None:
        self.settings = settings
        self._lock = threading.RLock()
        self._users = 0
        self._before: list[str] = []
        self._errors: dict[torch.device, tuple[float, float]] = {}

    def turn_on(self) -> Callable[[], None]:
        """Set them, unless a model before did.

        Returns:
            What takes it back; a second call of it does nothing.
        """
        with self._lock:
            if self._users == 0:
                self._before = [getattr(owner, name) for owner, name, _ in self.settings]
                try:
                    self._set([value for _, _, value in self.settings])
                except BaseException:
                    self._set(self._before)
                    raise
            self._users += 1
        stack = contextlib.ExitStack()
        stack.callback(self._leave)
        return stack.close

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for (owner, name, value), before in zip(self.settings, self._before, strict=True):
                    if getattr(owner, name) == value:
                        setattr(owner, name, before)

    def _set(self, values: list[str]) -> None:
        for (owner, name, _), value in zip(self.settings, values, strict=True):
            setattr(owner, name, value)

    def errors(self, device: torch.device) -> tuple[float, float]:
        """Measure what the switches cost: a matrix product and a convolution against float64, once a device.

        Args:
            device: where.

        Returns:
            The larger relative error (Frobenius norm) of the two with the switches as the user has them, and with them
            on.
        """
        with self._lock:
            if device not in self._errors:
                with self._off():
                    plain = _error(device)
                with self._on():
                    self._errors[device] = plain, _error(device)
            return self._errors[device]

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        # A model on another device of the type may have turned them on.
        now = [getattr(owner, name) for owner, name, _ in self.settings]
        self._set(self._before if self._users else now)
        try:
            yield
        finally:
            self._set(now)

    @contextlib.contextmanager
    def _on(self) -> Iterator[None]:
        off = self.turn_on()
        try:
            yield
        finally:
            off()


def _error(device: torch.device) -> float:
    grid = torch.arange(256 * 256, dtype=torch.float64).mul(0.7).sin().reshape(256, 256)
    images = grid[:, :64].reshape(4, 16, 16, 16)
    kernel = grid[:16, :144].reshape(16, 16, 3, 3)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):

        def of(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
            # Both round the operands to float32 first: only the products and sums differ.
            a, b = a.float(), b.float()
            true = function(a.double(), b.double())
            mine = function(a.to(device), b.to(device)).cpu().double()
            return float((mine - true).norm() / true.norm())

        return max(of(torch.mm, grid, grid.T), of(F.conv2d, images, kernel))
