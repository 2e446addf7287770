"""What became of the models that a script trains, to be told when it ends, also of models that are gone by then."""

from __future__ import annotations

import weakref

from wrapprec.fused import Skips
from wrapprec.handle import Handle


class Found:
    """A model, or several that one optimizer trains, and what became of them. Keeps none of them alive.

    Args:
        label: for people: classes, parameters, optimizers.

    Attributes:
        reason: why they were left alone; None where they were not.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.reason: str | None = None
        self._handle: weakref.ref[Handle] | None = None

    @property
    def handle(self) -> Handle | None:
        """The one of the wrapped models, as long as they live."""
        return None if self._handle is None else self._handle()

    def wrapped(self, handle: Handle) -> None:
        """Note that they are wrapped; again when another optimizer was attached.

        Args:
            handle: theirs.
        """
        self._handle = weakref.ref(handle)
        self._policies = " and ".join(dict.fromkeys(str(plan.policy) for plan in handle.plans))
        # What is left of the models when they are gone: a few numbers, some of them on the device.
        self._scalers = [(model.scaler, model.backend) for model in handle._models]
        self._skips: list[Skips] = [stepper.skips for stepper in handle._steppers]

    def __str__(self) -> str:
        """What was wrapped and what came of it; nothing where the models were left alone."""
        if self._handle is None:
            return ""
        if (handle := self.handle) is not None:
            self.wrapped(handle)  # on another device by now, perhaps
            skipped = handle._count_skipped()  # with those before a resumption
        else:
            read = self._scalers[0][1].read
            skipped = sum(skips.count(lambda tensor: read(tensor)[0]) for skips in self._skips)
        scales = [1.0 if scaler is None else backend.read(scaler.scale)[0] for scaler, backend in self._scalers]
        scaled = any(scaler is not None for scaler, _ in self._scalers)
        scale = " and ".join(f"{scale:g}" for scale in scales) if scaled else "none"
        return f"wrapped {self.label}: {self._policies}, skipped steps {skipped}, final loss scale {scale}"


def tell(found: list[Found]) -> list[str]:
    """The lines of a summary, each once: a search over settings wraps many models that end alike.

    Args:
        found: in the order in which they were found.

    Returns:
        A line for what was wrapped; nothing for what was left alone, which was said then.
    """
    counts: dict[str, int] = {}
    for one in found:
        if line := str(one):
            counts[line] = counts.get(line, 0) + 1
    return [line if count == 1 else f"{line}; {count} such models" for line, count in counts.items()]
