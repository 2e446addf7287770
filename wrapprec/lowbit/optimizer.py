"""Keeps the state of an existing torch optimizer in 8 or 4 bits, while its own step computes in 32."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from wrapprec.dtypes import MIXABLE
from wrapprec.errors import PolicyError, message
from wrapprec.lent import originals
from wrapprec.lowbit.codes import Low, dequantise, is_low, load_kernels, quantise, restore
from wrapprec.lowbit.forms import check_foreign, check_group, check_plain, form_of, is_the_schedulers
from wrapprec.lowbit.loading import Loading
from wrapprec.lowbit.sizes import FEWEST
from wrapprec.patch import function_of, patch
from wrapprec.undo import UndoStack

_AT_ONCE = 2**24
"""Elements whose state is in 32 bits at one time, during a step; one larger parameter is stepped by itself."""

_converted: weakref.WeakKeyDictionary[Optimizer, LowBits] = weakref.WeakKeyDictionary()


def check(optimizer: Optimizer, bits: int | None) -> None:
    """Raise if this optimizer cannot be converted, or computes wrongly by itself; changes nothing.

    Raises:
        PolicyError: it has no form with so few bits, a package is missing, or a kernel is known to be wrong.
    """
    check_foreign(optimizer)
    if bits is None:
        return
    if bits not in (8, 4):
        raise PolicyError(
            message("optimizer_bits of 8 or 4, or None", repr(bits), remedy="leave it out for state in 32 bits")
        )
    known = _converted.get(optimizer)
    if known is not None and known.bits != bits:
        raise PolicyError(
            message(
                f"optimizer_bits={known.bits}, which this {type(optimizer).__name__} was converted to",
                f"optimizer_bits={bits}",
                remedy="unwrap the model that it was converted with first",
            )
        )
    form_of(optimizer, bits)
    load_kernels(bits)
    for group in optimizer.param_groups:
        for param in group["params"]:
            check_plain(param)


def convert(optimizer: Optimizer, bits: int, kept: Callable[[], Iterable[Tensor]], undo: UndoStack) -> LowBits:
    """Have an optimizer keep its state in few bits from its next step on; converting twice does nothing more.

    Args:
        optimizer: the object stays the same; it is not kept alive.
        bits: 8 or 4.
        kept: the parameters whose state stays in 32 bits whatever their size: those of embeddings.
        undo: gives 32-bit state back.

    Raises:
        PolicyError: see `check`.
    """
    check(optimizer, bits)
    known = _converted.get(optimizer)
    if known is None:
        known = LowBits(optimizer, bits, kept)
        known.install(undo)
    return known


class LowBits:
    """What quantises the state of one optimizer between its steps."""

    def __init__(self, optimizer: Optimizer, bits: int, kept: Callable[[], Iterable[Tensor]]) -> None:
        self.bits = bits
        self.form = form_of(optimizer, bits)
        self._optimizer = weakref.ref(optimizer)
        self._kept = kept
        # By parameter: whether it is one of `kept`.
        self._known: Any = WeakIdKeyDictionary()
        self._fused: Any = None
        self._active = True

    # Installing

    def install(self, undo: UndoStack) -> None:
        """Put our step over the optimizer's, and look after what is loaded; everything goes through `undo`."""
        optimizer = self._optimizer()
        assert optimizer is not None
        own = optimizer.__dict__.get("step")
        before = None if own is None else function_of(own)
        plain = before is None or is_the_schedulers(before, optimizer)
        hooked = Optimizer.profile_hook_step(self._step)

        @functools.wraps(function_of(optimizer.step))
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._active and plain:
                if before is not None:
                    # The scheduler's own wrapper would do the same.
                    optimizer._opt_called = True  # type: ignore[attr-defined]
                return hooked(optimizer, *args, **kwargs)
            if before is None:
                return type(optimizer).step(optimizer, *args, **kwargs)
            if not self._active:
                return before(optimizer, *args, **kwargs)
            # Somebody's own step: it is called once, and finds all its state in 32 bits.
            with self._wide(optimizer, [p for group in optimizer.param_groups for p in group["params"]]):
                return before(optimizer, *args, **kwargs)

        # What is called once for some of the parameters, and once for the others, does what one call does.
        step.in_parts = plain  # type: ignore[attr-defined]
        _converted[optimizer] = self
        undo.push(self._put_back)
        patch(optimizer, "step", step, undo)
        # A fused kernel that is told to skip by a flag on the device would have its state rounded all the same.
        self._fused = optimizer.__dict__.get("_step_supports_amp_scaling")
        optimizer.__dict__["_step_supports_amp_scaling"] = False
        loading = Loading(self.quantise)
        undo.push(optimizer.register_load_state_dict_pre_hook(loading.begin).remove)
        undo.push(optimizer.register_load_state_dict_post_hook(loading.end).remove)

    def quantise(self) -> None:
        """Quantise the state that is there; what is not comes quantised out of the next step."""
        optimizer = self._optimizer()
        if optimizer is not None:
            for param in list(optimizer.state):
                if isinstance(param, Tensor):
                    self._narrow(optimizer, param)

    def _put_back(self) -> None:
        self._active = False
        optimizer = self._optimizer()
        if optimizer is None:
            return
        _converted.pop(optimizer, None)
        if self._fused is None:
            optimizer.__dict__.pop("_step_supports_amp_scaling", None)
        else:
            optimizer.__dict__["_step_supports_amp_scaling"] = self._fused
        for param, state in optimizer.state.items():
            for key, value in state.items() if isinstance(param, Tensor) else ():
                if is_low(value):
                    state[key] = dequantise(value, param)

    # The step

    @_disable_dynamo
    def _step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Run the optimizer's own code on some parameters after the others, each time with their state in 32 bits."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = type(optimizer).step
        # Hooks on the step have been run around this one.
        own = own.__wrapped__ if getattr(own, "hooked", False) else own  # type: ignore[attr-defined]
        for number, group in enumerate(optimizer.param_groups):
            check_group(optimizer, group, number)
            for params in self._chunks(group):
                part = object.__new__(type(optimizer))
                part.__dict__.update(optimizer.__dict__)
                part.param_groups = [{**group, "params": params}]
                with self._wide(optimizer, params):
                    own(part)
        return loss

    def _chunks(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        chunk: list[Tensor] = []
        elements = 0
        for param in group["params"]:
            if param.grad is None:
                continue
            more = param.numel() if self._is_quantised(param) else 0
            if chunk and elements + more > _AT_ONCE:
                yield chunk
                chunk, elements = [], 0
            chunk.append(param)
            elements += more
        if chunk:
            yield chunk

    @contextlib.contextmanager
    def _wide(self, optimizer: Optimizer, params: list[Tensor]) -> Iterator[None]:
        """Show the state of some parameters in 32 bits, and quantise what has become of it."""
        held: list[tuple[dict[str, Any], dict[str, Low]]] = []
        try:
            for param in params:
                state = optimizer.state.get(param, {})
                low = {key: value for key, value in state.items() if is_low(value)}
                held.append((state, low))
                state.update({key: dequantise(value, param) for key, value in low.items()})
            yield
        except BaseException:
            # As it was, to the bit.
            for state, low in held:
                state.update(low)
            raise
        for param in params:
            self._narrow(optimizer, param)

    def _narrow(self, optimizer: Optimizer, param: Tensor) -> None:
        state = optimizer.state.get(param, {})
        quantised = self._is_quantised(param)
        for key, signed in self.form.items():
            value = state.get(key)
            if is_low(value):
                if quantised and value["bits"] == self.bits:
                    state[key] = restore(value)
                    continue
                # It was saved by an optimizer that kept it otherwise.
                state[key] = value = dequantise(value, param)
            if quantised and isinstance(value, Tensor) and value.shape == param.shape:
                state[key] = quantise(value, self.bits, signed, _count(state))

    def _is_quantised(self, param: Tensor) -> bool:
        if is_lazy(param) or param.numel() < FEWEST or param.dtype not in MIXABLE:
            return False
        # Whoever shows the optimizer something else in a parameter's place, as rounding does, says so.
        param = getattr(param, "stands_for", param)
        if param not in self._known:
            check_plain(param)
            optimizer, kept = self._optimizer(), {id(p) for p in self._kept()}
            groups = [] if optimizer is None else optimizer.param_groups
            for other in chain([param], *(group["params"] for group in groups)):
                self._known.setdefault(other, id(other) in kept)
        return not self._known[param]

    def describe(self) -> str:
        """Say what is kept in how many bits, in one line."""
        optimizer = self._optimizer()
        if optimizer is None:
            return ""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        number = sum(map(self._is_quantised, params))
        groups = optimizer.param_groups
        kept = [key for key in self.form if any(group.get(_ONLY_WITH.get(key, ""), True) for group in groups)]
        if not kept:
            return f"{type(optimizer).__name__}: no state, so none in {self.bits} bits"
        return (
            f"{type(optimizer).__name__}: {', '.join(kept)} in {self.bits} bits for {number} of {len(params)}"
            f" parameters; embeddings and tensors of fewer than {FEWEST:,} elements keep 32"
        )


_ONLY_WITH = {"max_exp_avg_sq": "amsgrad", "momentum_buffer": "momentum"}
"""State that there is where a setting of the group is not 0 or False."""


def _count(state: dict[str, Any]) -> Tensor | None:
    """The number of steps that a parameter has taken, wherever it lies."""
    step = state.get("step")
    return step if step is None or isinstance(step, Tensor) else torch.tensor(step)


def embedded(roots: Iterable[weakref.ref[nn.Module] | None]) -> Iterator[Tensor]:
    """The parameters of the embeddings below weakly held models: of their rows few move at a step, and these far."""
    for root in roots:
        model = None if root is None else root()
        for module in () if model is None else model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                for below in module.modules():
                    yield from (param for param in originals(below).values() if param is not None)
