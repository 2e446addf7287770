"""How the loss scale starts and moves: a value that prints and parses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

from wrapprec.errors import PolicyError, message, nearest


@dataclass(frozen=True)
class LossScale:
    """How the loss scale starts and moves; the defaults are GradScaler's, and a floor.

    Args:
        init_scale: the first scale.
        growth_factor: multiplies the scale after `growth_interval` good steps in a row.
        backoff_factor: multiplies the scale after `hysteresis` overflows.
        growth_interval: in steps.
        min_scale: the scale never falls below.
        max_scale: the scale never rises above.
        hysteresis: overflows in a row before the scale backs off.
        max_consecutive_skips: skipped steps at `min_scale` before training is given up.
        dynamic: False keeps `init_scale` for ever.

    Raises:
        PolicyError: a value is out of its range.

    >>> LossScale(init_scale=1024.0).growth_interval
    2000
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 1.0
    max_scale: float = 2.0**120
    hysteresis: int = 1
    max_consecutive_skips: int = 100
    dynamic: bool = True

    def __post_init__(self) -> None:
        def require(holds: bool, expected: str, name: str) -> None:
            if not holds:
                received = f"{name}={getattr(self, name)!r}"
                raise PolicyError(message(expected, received, remedy=f"change {name}, or leave it out"))

        for name in ("growth_interval", "hysteresis", "max_consecutive_skips"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, f"a whole number of at least 1 for {name}", name)
        for name in ("init_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and math.isfinite(value), f"a finite number for {name}", name)
            object.__setattr__(self, name, float(value))
        require(self.growth_factor > 1, "a growth_factor above 1", "growth_factor")
        require(0 < self.backoff_factor < 1, "a backoff_factor between 0 and 1", "backoff_factor")
        require(self.min_scale > 0, "a min_scale above 0", "min_scale")
        bounds = f"an init_scale between min_scale={self.min_scale!r} and max_scale={self.max_scale!r}"
        require(self.min_scale <= self.init_scale <= self.max_scale, bounds, "init_scale")

    @classmethod
    def static(cls, value: float) -> LossScale:
        """Make a scale that never moves.

        Args:
            value: the scale.

        Returns:
            It, with `min_scale` and `max_scale` at the same value.

        >>> LossScale.static(1024).init_scale
        1024.0
        """
        return cls(init_scale=value, min_scale=value, max_scale=value, dynamic=False)


LossScaling: TypeAlias = LossScale | Literal["auto"] | None


def parse_loss_scale(value: object) -> LossScaling:
    """Read what may be given as a loss scale.

    Args:
        value: `auto`, None, `none` or False (no scaling), `dynamic`, a number (static) or a `LossScale`.

    Returns:
        `auto`, None or a `LossScale`.

    Raises:
        PolicyError: it is none of these.

    >>> parse_loss_scale("none"), parse_loss_scale("dynamic") == LossScale(), parse_loss_scale(8).init_scale
    (None, True, 8.0)
    """
    if value is None or value is False or isinstance(value, LossScale):
        return value or None
    if isinstance(value, (int, float)) and value is not True:
        return LossScale.static(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in ("auto", "none", "dynamic"):
        return "auto" if text == "auto" else None if text == "none" else LossScale()
    try:
        return LossScale.static(float(text))
    except ValueError as error:
        if isinstance(error, PolicyError):
            raise
    raise PolicyError(
        message(
            "a loss scale: 'auto', 'none', 'dynamic', a number or a LossScale",
            f"{value!r} (of type {type(value).__name__})",
            remedy=nearest(text, ["auto", "none", "dynamic"]) + "write one of these",
        )
    )


def read_scale(texts: Mapping[str, str], default: LossScaling) -> LossScaling:
    """Read the loss scale from the fields of a policy's text.

    Args:
        texts: values by full key; keys that a loss scale does not have are left alone.
        default: what holds where nothing is written.

    Returns:
        The loss scale; a bare `init_scale=...` means a dynamic one.

    Raises:
        PolicyError: a value cannot be read, or a key goes with no scale.

    >>> read_scale({"init_scale": "8"}, None) == LossScale(init_scale=8.0)
    True
    """
    values = {f.name: texts[f.name] for f in fields(LossScale) if f.name in texts and f.name != "dynamic"}
    kind = texts.get("loss_scale", "dynamic" if values else None)
    if kind is None:
        return default
    if kind.lower() == "dynamic" or (kind.lower() == "static" and values):
        numbers: dict[str, Any] = {key: _number(key, text) for key, text in values.items()}
        return LossScale(dynamic=kind.lower() == "dynamic", **numbers)
    if values:
        key = next(iter(values))
        raise PolicyError(
            message(
                f"loss_scale=dynamic together with {key}",
                f"loss_scale={kind}",
                remedy=f"write loss_scale=dynamic, or leave {key} out",
            )
        )
    return parse_loss_scale(kind)


def _number(key: str, text: str) -> float | int:
    try:
        whole = isinstance(getattr(LossScale, key), int)
        return int(text) if whole else float(text)
    except ValueError as error:
        raise PolicyError(message(f"a number for {key}", f"{key}={text}", remedy=f"write {key}=1 or so")) from error


def write_scale(scale: LossScaling) -> dict[str, str]:
    """Write the fields that `read_scale` turns back into an equal loss scale.

    Args:
        scale: what to write.

    Returns:
        Values by full key.

    >>> write_scale(LossScale.static(1024)), write_scale(LossScale(hysteresis=2))
    ({'loss_scale': '1024.0'}, {'loss_scale': 'dynamic', 'hysteresis': '2'})
    """
    if not isinstance(scale, LossScale):
        return {"loss_scale": scale or "none"}
    if not scale.dynamic and scale == LossScale.static(scale.init_scale):
        return {"loss_scale": repr(scale.init_scale)}
    usual = LossScale()
    changed = [f.name for f in fields(scale) if getattr(scale, f.name) != getattr(usual, f.name)]
    items = {"loss_scale": "dynamic" if scale.dynamic else "static"}
    items |= {name: repr(getattr(scale, name)) for name in changed if name != "dynamic"}
    if not scale.dynamic and len(items) == 1:
        items["init_scale"] = repr(scale.init_scale)  # a bare `static` would not say how large
    return items
