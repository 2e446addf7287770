"""How a policy and FSDP share the work: FSDP casts the weights that it gathers, wrapprec casts the activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wrapprec.dtypes import LOW, name
from wrapprec.errors import PolicyError, WrapprecError, message, module_label
from wrapprec.placement import Plan
from wrapprec.policy import Policy
from wrapprec.sharded import MARK, groups_of, states_below

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


def fsdp_policy(policy: Policy | int | str | torch.dtype) -> MixedPrecisionPolicy:
    """The mixed precision policy to give to `fully_shard` where the model is then wrapped with `policy`.

    - ``param_dtype`` is the compute dtype: weights are sent, and held while they are used, in it. The shards that the
      optimizer steps stay float32. None where the policy computes in float32.
    - ``reduce_dtype`` is float32: sums over many processes lose least in it, and true gradients, without the loss
      scale, would fall below float16's range.
    - ``output_dtype`` is None, and ``cast_forward_inputs`` False: wrapprec casts inputs and outputs, inside the border
      of the loss scale.

    Args:
        policy: whatever `Policy.parse` takes.

    Returns:
        The policy for `fully_shard`'s argument ``mp_policy``.

    Raises:
        PolicyError: the policy cannot be read, or has weights that FSDP cannot gather.

    >>> both = fsdp_policy("16-mixed")
    >>> both.param_dtype, both.reduce_dtype, both.output_dtype, both.cast_forward_inputs
    (torch.float16, torch.float32, None, False)
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    precision = Policy.parse(policy).precision
    param, compute = precision.param_dtype, precision.compute_dtype
    if isinstance(param, str) or compute == "fp8":
        raise PolicyError(
            message(
                "a policy whose weights are sent in float32, bfloat16 or float16",
                f"{policy!r}, which stores them in {name(param)} and computes in {name(compute)}",
                remedy="use bf16-mixed or 16-mixed with fully_shard",
            )
        )
    low = precision.activation_dtype if compute in LOW else None
    return MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=None if low is None else torch.float32, cast_forward_inputs=False
    )


def check_sharding(model: nn.Module, plan: Plan) -> None:
    """Refuse what FSDP was told to do where it would make a value or a gradient wrong under the plan.

    Raises:
        WrapprecError: FullyShardedDataParallel, or a `fully_shard` around the model, manages parameters of it.
        PolicyError: a ``mp_policy`` that does not fit.
    """
    covered: set[int] = set()
    for state in states_below(model):
        for module in state._modules:
            covered.update(map(id, module.modules()))
    for fqn, module in model.named_modules():
        first_form = type(module).__name__ == "FullyShardedDataParallel"
        if first_form or (MARK in module.__dict__ and id(module) not in covered):
            raise WrapprecError(
                message(
                    "the model that fully_shard was called on",
                    "a module of FullyShardedDataParallel, which is not supported"
                    if first_form
                    else "a part of a model that FullyShardedDataParallel, or a fully_shard around it, manages",
                    where=module_label(fqn, module),
                    remedy="call torch.distributed.fsdp.fully_shard(model, mp_policy=wrapprec.fsdp_policy(policy)), and"
                    " wrap the whole model",
                )
            )
    names = {id(module): fqn for fqn, module in model.named_modules()}
    for state in states_below(model):
        for group in groups_of(state):
            problem = _disagreement(group, plan)
            if problem is not None:
                module = state._modules[0]
                wanted, received, remedy = problem
                where = module_label(names.get(id(module), ""), module)
                raise PolicyError(message(wanted, received, where=where, remedy=remedy))


def _disagreement(group: Any, plan: Plan) -> tuple[str, str, str] | None:
    """What is expected of FSDP, what was received, and the remedy."""
    given = group.mp_policy
    told = f"MixedPrecisionPolicy({', '.join(f'{key}={value}' for key, value in vars(given).items())})"
    remedy = "call fully_shard(module, mp_policy=wrapprec.fsdp_policy(policy)) with the policy given to wrap"
    lows = {p.precision.activation_dtype for p in plan.placements if p.precision.casting is not None}
    if given.param_dtype in LOW and given.param_dtype not in lows:
        wanted = f"weights gathered in float32, or in what the policy {plan.policy} computes in"
        return wanted, told, remedy
    offload = getattr(group, "offload_policy", None)
    if type(offload).__name__ == "CPUOffloadPolicy" and group.device.type != "cpu":
        return (
            "shards on the device that computes",
            f"{offload} with modules on {group.device}",
            "leave offload_policy out of fully_shard",
        )
    if plan.loss_scale is None:
        return None
    reduced = given.reduce_dtype
    if reduced is torch.float16:
        return "gradients reduced in float32 or bfloat16, for true ones fall below float16's range", told, remedy
    if given.output_dtype is torch.float16:
        return "outputs in float32 or bfloat16, for true gradients fall below float16's range", told, remedy
    if given.cast_forward_inputs and given.param_dtype is torch.float16:
        return "inputs left to wrapprec, which casts them inside the border of the loss scale", told, remedy
    return None
