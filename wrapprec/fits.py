"""Which layers compute in fp8: torch's own Linear whose sizes fit and gain by it, but for the first and the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from wrapprec.backends.base import Backend
from wrapprec.defaults import Decision
from wrapprec.placement import Placement
from wrapprec.precision import Precision
from wrapprec.recipe import TENSORWISE

_MULTIPLE = 16
"""Of what the sizes of the operands must be multiples in the kernels of every device that has some."""


def ends(modules: Iterable[nn.Module]) -> dict[int, str]:
    """Find the layers at both ends of a model: what the numbers come in by, and what they leave by.

    Args:
        modules: all of them, in the order in which they are registered.

    Returns:
        `first Linear` and `last Linear` by the id of the module.

    >>> layers = [nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2)]
    >>> [ends(layers).get(id(layer)) for layer in layers]
    ['first Linear', None, None, 'last Linear']
    """
    linears = [id(module) for module in modules if isinstance(module, nn.Linear)]
    return {linears[-1]: "last Linear", linears[0]: "first Linear"} if linears else {}


def default(
    module: nn.Module, above: Precision, ends: Mapping[int, str], backend: Backend, device: torch.device
) -> Decision | None:
    """Say whether a layer that could compute in fp8 stays in bfloat16 unless a rule says otherwise.

    Args:
        module: the module.
        above: the precision around it.
        ends: what `ends` gave for the whole model.
        backend: of the device.
        device: where it computes.

    Returns:
        The decision, or None.
    """
    if above.compute_dtype != "fp8" or unfit(module) is not None:
        return None
    end = ends.get(id(module))
    if end is not None:
        reason = f"the {end} of the model stays in bfloat16: inputs and outputs need its precision most"
        return Decision(above.surroundings, f"default: {end}", reason, is_default=True)
    # Where fp8 is emulated no layer gains by it, and small ones show what it does to the numbers as large ones do.
    multiplies = backend.float8 is not None and backend.float8.multiplies(device)
    if isinstance(module, nn.Linear) and multiplies and _is_small(module, above.recipe):
        sizes = f"{module.in_features} x {module.out_features}"
        reason = f"casts to fp8 cost more than its products gain at {sizes}, by torchao's measurements"
        return Decision(above.surroundings, f"default: too small to gain by fp8 ({sizes})", reason, is_default=True)
    return None


def settle(module: nn.Module, decision: Decision) -> Decision:
    """Bring a decision for fp8 to what the module can do.

    Args:
        module: the module.
        decision: of the rules; it goes on to govern what is below.

    Returns:
        The same where it is for something else, or where the module computes in fp8 or only holds others; otherwise
        one for bfloat16, with the reason.
    """
    if decision.precision.compute_dtype != "fp8":
        return decision
    reason = unfit(module)
    if reason is None or (module._modules and not module._parameters):
        return decision
    rule = f"{decision.rule}; not fp8: {reason}" if isinstance(module, nn.Linear) else decision.rule
    return Decision(decision.precision.surroundings, rule, f"{decision.reason}; computed in bfloat16: {reason}")


def unfit(module: nn.Module) -> str | None:
    """Say why a module cannot compute in fp8.

    Args:
        module: any module.

    Returns:
        The reason, or None where it can.

    >>> unfit(nn.Linear(32, 48)), unfit(nn.Linear(32, 10)), unfit(nn.Conv2d(16, 16, 3))
    (None, 'out_features=10 is no multiple of 16', 'only Linear layers do')
    """
    if not isinstance(module, nn.Linear):
        return "only Linear layers do"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "attention uses its weight directly"
    if type(module).forward is not nn.Linear.forward or _is_replaced(module):
        return "it has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        return "it has no sizes before its first forward"
    if weight is not None and type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__}"
    for key in ("in_features", "out_features"):
        if getattr(module, key) % _MULTIPLE:
            return f"{key}={getattr(module, key)} is no multiple of {_MULTIPLE}"
    return None


def missed(modules: Mapping[str, nn.Module], placements: Iterable[Placement]) -> str | None:
    """What to say of a plan that asks for fp8, if no layer of it computes so."""
    layers = [p for p in placements if isinstance(modules.get(p.name), nn.Linear)]
    if any(p.precision.compute_dtype == "fp8" for p in layers):
        return None
    return f"fp8 was asked for, and none of {len(layers)} Linear layers computes in it: the plan says why"


def _is_replaced(module: nn.Module) -> bool:
    """Somebody put another forward on this instance; neither wrapprec's stand-in nor accelerate's is one."""
    own = module.__dict__
    forward = own.get("_old_forward" if "_hf_hook" in own and "_old_forward" in own else "forward")
    forward = getattr(forward, "replaced", forward)
    return forward is not None and getattr(forward, "__func__", None) is not nn.Linear.forward


def _is_small(module: nn.Linear, recipe: str | None) -> bool:
    """The thresholds of torchao's `_auto_filter_for_recipe` (0.18), from its benchmarks on H100s.

    It has none for `rowwise_with_gw_hp`, of which two products in three are those of `rowwise`.
    """
    columns, rows = module.in_features, module.out_features
    if recipe == TENSORWISE:
        return columns <= 4096 and rows <= 1024
    return rows <= 2048 or columns <= 1024 or (rows <= 4096 and columns <= 2048)
