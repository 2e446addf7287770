"""What a wrapped model keeps beside its low precision weights: their remainders, and where random bits come from."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wrapprec.backends.select import backend_for
from wrapprec.dtypes import LOW, REAL
from wrapprec.errors import PolicyError, message
from wrapprec.lowbit.words import combine, round_by_chance, split
from wrapprec.standin import forward_of
from wrapprec.undo import UndoStack

if TYPE_CHECKING:
    from wrapprec.state import Shared


PIECE = 2**17
"""How many numbers are split at once: what is made on the way fits into a cache, and is small beside the weights."""


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors of one shape in pieces that share their storage; whole where they are not laid out alike."""
    if not (backend_for(tensors[0].device).in_pieces and all(tensor.is_contiguous() for tensor in tensors)):
        return [tensors]
    return zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True)


class Kept:
    """The rounding of one wrapped model's weights.

    Args:
        mode: `kahan`, `stochastic` or `nearest`.

    Attributes:
        rests: under `kahan`, the remainder of each trained weight by its qualified name, int16; what is missing is 0.
        dtypes: by the qualified name of each tensor that was converted, the dtype it had and the one it has.
    """

    def __init__(self, mode: str | None) -> None:
        self.mode = mode
        self.rests: dict[str, Tensor] = {}
        self.dtypes: dict[str, tuple[torch.dtype, torch.dtype]] = {}
        # The dtype of gradients by name, where it is another than the weight's.
        self.grads: dict[str, torch.dtype] = {}
        self._generators: dict[str, Any] = {}
        self._states: dict[str, Tensor] = {}

    def widen(self, name: str, weight: Tensor) -> Tensor:
        """A weight as the optimizer is to see it: float32, a tensor of its own."""
        rest = self.rests.get(name)
        if rest is None or rest.shape != weight.shape:
            return weight.detach().to(torch.float32)
        wide = torch.empty_like(weight, dtype=torch.float32)
        for whole, low, more in _pieces(wide, weight.detach(), rest.to(weight.device)):
            whole.copy_(combine(low, more))
        return wide

    def narrow(self, name: str, weight: Tensor, wide: Tensor, seed: int) -> None:
        """Write a float32 number into a weight, as the mode wants it.

        Args:
            name: the weight's qualified name.
            weight: low precision; written in place.
            wide: float32.
            seed: of the random bits, where none were drawn yet.
        """
        low = rest = weight.detach()
        if self.mode == "kahan":
            known = self.rests.get(name)
            fits = known is not None and known.shape == low.shape and known.device == low.device
            rest = self.rests[name] = known if known is not None and fits else torch.empty_like(low, dtype=torch.int16)
        for whole, narrow, more in _pieces(wide, low, rest):
            if self.mode == "kahan":
                rounded, left = split(whole, weight.dtype)
                more.copy_(left)
            elif self.mode == "stochastic":
                rounded = round_by_chance(whole, weight.dtype, self._generator(wide.device, seed))
            else:
                rounded = whole.to(weight.dtype)
            narrow.copy_(rounded)

    def _generator(self, device: torch.device, seed: int) -> Any:
        key = str(device)
        if key not in self._generators:
            generator = backend_for(device).generator(device)
            if key in self._states:
                generator.set_state(self._states.pop(key))
            else:
                generator.manual_seed(seed)
            self._generators[key] = generator
        return self._generators[key]

    def _random(self) -> dict[str, Tensor]:
        return self._states | {key: generator.get_state() for key, generator in self._generators.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: remainders by name, and the states of the random generators by device."""
        return {"mode": self.mode, "rests": dict(self.rests), "random": self._random()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume; under another mode than the saved one, the weights go on as they are."""
        self.rests, self._generators, self._states = {}, {}, {}
        if self.mode == state["mode"]:
            self.rests = {name: rest.clone() for name, rest in state["rests"].items()}
            self._states = {key: value.clone() for key, value in state["random"].items()}

    def regrade(self, params: Iterable[tuple[str, Any]]) -> None:
        """Have gradients of a copied, or loaded, model in their dtype again, which torch does not copy."""
        for name, param in params if self.grads else ():
            if name in self.grads and param.grad is None:
                param.grad_dtype = self.grads[name]

    def __getstate__(self) -> dict[str, Any]:
        # Generators do not pickle on every device; their states do.
        return {**self.__dict__, "_generators": {}, "_states": self._random()}


def follow_loading(model: nn.Module, undo: UndoStack) -> None:
    """Have the remainders follow a float32 checkpoint that is loaded, so that not even its last bits are lost.

    Args:
        model: the root; its weights have remainders.
        undo: takes the hook away.
    """
    # torch puts the hook into an object that holds the module weakly, and copies with it.
    model.register_load_state_dict_pre_hook(_load_rests)
    ref = weakref.ref(model)
    undo.push(lambda: forget_loading(ref()))


def forget_loading(model: nn.Module | None) -> None:
    """Take the hook away, of a copy of a wrapped model too."""
    hooks = {} if model is None else model._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", None) is _load_rests:
            del hooks[key]


def _load_rests(module: nn.Module, state: dict[str, Any], prefix: str, local: dict[str, Any], *_: Any) -> None:
    """Split what is wider than the weights; torch copies the rest of `state`, which is its own, as it is."""
    forward: Any = forward_of(module)
    kept = None if forward is None else forward.shared.converted
    if kept is None or local.get("assign_to_params_buffers"):
        return
    for name, rest in kept.rests.items():
        given, dtype = state.get(prefix + name), kept.dtypes[name][1] if name in kept.dtypes else None
        if isinstance(given, Tensor) and given.dtype in REAL - LOW and given.shape == rest.shape and dtype in LOW:
            state[prefix + name], left = split(given.detach().to(torch.float32), dtype)
            rest.copy_(left)


def forget_rests(models: Iterable[Shared]) -> None:
    """Nobody trains these models so far: keep no remainders of their weights."""
    for model in models:
        if model.converted is not None:
            model.converted.rests.clear()


def save_kept(models: Sequence[Shared]) -> dict[str, Any]:
    """What is to be saved of the rounding, model by model; nothing where no model is rounded."""
    states = [None if model.converted is None else model.converted.state_dict() for model in models]
    return {"rounding": states} if any(states) else {}


def load_kept(models: Sequence[Shared], states: Iterable[dict[str, Any] | None]) -> None:
    """Give every model its remainders back; all of them, or none.

    Args:
        models: in the order in which they were saved.
        states: of `Kept.state_dict`, or None for a model that had none.

    Raises:
        PolicyError: a remainder is of another shape than the weight of its name, or there is no such weight.
    """
    both = zip(models, states, strict=True)
    pairs = [(m, m.converted, s) for m, s in both if m.converted is not None and s is not None]
    for model, kept, state in pairs:
        if model.model is not None:
            # A layer that came since wrap has remainders from now on, not from its first forward.
            forward_of(model.model).take_up()
        shapes = {name: param.shape for name, param in model.named_parameters()}
        wrong = [name for name, rest in state["rests"].items() if shapes.get(name) != rest.shape]
        if wrong and kept.mode == state["mode"]:
            raise PolicyError(
                message(
                    "the rounding state of this model",
                    f"a remainder of shape {tuple(state['rests'][wrong[0]].shape)}, where the model has"
                    f" {'no such parameter' if wrong[0] not in shapes else tuple(shapes[wrong[0]])}",
                    where=repr(wrong[0]),
                    remedy="load the state that was saved with this model",
                )
            )
    for _, kept, state in pairs:
        kept.load_state_dict(state)
