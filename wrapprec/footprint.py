"""How much state an optimizer keeps for a parameter, foreseen by one step of a parameter that has no storage."""

from __future__ import annotations

import functools
import inspect
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from wrapprec.dtypes import MIXABLE
from wrapprec.errors import PolicyError, message, nearest
from wrapprec.lowbit.forms import form_of
from wrapprec.lowbit.sizes import FEWEST, code_bytes

Shape = tuple[int, ...]
Make: TypeAlias = functools.partial[Any]


def state_of(
    optimizer: Optimizer | type[Optimizer] | str | Sequence[Optimizer], bits: int | None = None
) -> Callable[[Shape, torch.dtype, bool], float]:
    """Say how many bytes of state an optimizer keeps for a parameter, by having it step one without storage.

    Args:
        optimizer: an optimizer, its class, or the name of one of torch's; or several.
        bits: what the state is quantised to, as `optimizer_bits`; None for as it is.

    Returns:
        Bytes, by shape, dtype, and whether the parameter is an embedding's; step counters are not counted. Where
        parameters of one shape are in groups with different settings it is the mean, so that sums are right; a shape
        that no optimizer has counts as one of the first group.

    Raises:
        PolicyError: no optimizer of that name, or one whose state is not made parameter by parameter.

    >>> state_of("AdamW")((100, 100), torch.float32, False), state_of("AdamW", 8)((100, 100), torch.float32, False)
    (80000.0, 20320.0)
    """
    makers: list[Make] = []
    homes: dict[Shape, Counter[int]] = {}
    for one in optimizer if isinstance(optimizer, Sequence) and not isinstance(optimizer, str) else [optimizer]:
        for group in one.param_groups if isinstance(one, Optimizer) else [None]:
            for param in () if group is None else group["params"]:
                if not is_lazy(param):
                    homes.setdefault(tuple(param.shape), Counter())[len(makers)] += 1
            makers.append(_maker(one, group))

    @functools.cache
    def measure(shape: Shape, dtype: torch.dtype, embeds: bool) -> float:
        home = homes.get(shape) or homes.get(shape[::-1]) or Counter([0])  # a plan has Conv1D's as a linear layer's
        each = ((number, _measure(makers[one], shape, dtype, embeds, bits)) for one, number in home.items())
        return sum(number * size for number, size in each) / home.total()

    return measure


def _measure(make: Make, shape: Shape, dtype: torch.dtype, embeds: bool, bits: int | None) -> float:
    # Some read their own numbers on the host, which parameters without storage do not allow.
    for device in ("meta", "cpu"):
        param = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        param.grad = torch.zeros_like(param)
        try:
            stepped = make(param)
            stepped.step()
        except Exception as error:  # whatever somebody's optimizer raises
            last = error
            continue
        small = embeds or param.numel() < FEWEST or dtype not in MIXABLE
        form = {} if bits is None or small else form_of(stepped, bits)
        # What is there once for all parameters, such as bitsandbytes' tables of levels, is no state of one.
        once = {id(t) for table in vars(stepped).values() if table is not stepped.state for t in tree_leaves(table)}
        state = {key: s for key, s in stepped.state[param].items() if isinstance(s, torch.Tensor) and s.shape != ()}
        sizes = {key: code_bytes(bits or 0, s.numel()) if key in form else s.nbytes for key, s in state.items()}
        return float(sum(size for key, size in sizes.items() if id(state[key]) not in once))
    raise PolicyError(
        message(
            "an optimizer whose state can be foreseen by one step of one parameter",
            f"{make.args[0].__name__}, which raised {type(last).__name__}: {last}",
            remedy="name one that keeps as much state, e.g. memory(optimizer='AdamW')",
        )
    )


def _maker(optimizer: Any, group: dict[str, Any] | None) -> Make:
    if group is not None:
        if hasattr(optimizer, "get_config"):
            return functools.partial(_copy, type(optimizer), optimizer, group)
        # Some make their state when they are built, so a copy with another parameter would not do.
        taken = inspect.signature(type(optimizer)).parameters
        own = {key: value for key, value in group.items() if key in taken and key != "params"}
        plain = {"fused": False, "foreach": False, "capturable": False}
        options = own | {key: value for key, value in plain.items() if key in own}
        return functools.partial(_build, type(optimizer), options)
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        kind: Any = optimizer
    else:
        names = {k.lower(): k for k, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, Optimizer)}
        found = names.get(optimizer.lower()) if isinstance(optimizer, str) else None
        if found is None:
            hint = nearest(str(optimizer).lower(), names)
            raise PolicyError(
                message(
                    "an optimizer, its class, or the name of one of torch.optim's",
                    f"{optimizer!r} (of type {type(optimizer).__name__})",
                    remedy=f"{hint}write e.g. 'AdamW' or 'SGD'",
                )
            )
        kind = getattr(torch.optim, found)
    return functools.partial(_build, kind, {})


def _build(kind: Any, options: dict[str, Any], param: torch.nn.Parameter) -> Any:
    return kind([param], **options)


def _copy(kind: Any, optimizer: Optimizer, group: dict[str, Any], param: torch.nn.Parameter) -> Any:
    """Another optimizer of bitsandbytes with the settings of one: those of the group are not those of the class."""
    made = object.__new__(kind)
    for key, value in vars(optimizer).items():
        if key not in ("step", "zero_grad"):
            made.__dict__[key] = dict(value) if key == "name2qmap" else value  # a step moves tables to its device
    hooks = {key: OrderedDict[Any, Any]() for key in vars(optimizer) if key.endswith("_hooks")}
    made.__dict__.update(hooks, state=defaultdict(dict), param_groups=[{**group, "params": [param]}])
    return made
