"""What Apex's opt levels and their overrides mean, as a policy and a loss scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from wrapprec.errors import PolicyError, message, nearest
from wrapprec.lossscale import LossScale
from wrapprec.policy import Policy, Rule


@dataclass(frozen=True)
class Options:
    """Apex's properties; the fields have the names and the defaults that an opt level has in Apex.

    Args:
        opt_level: `O0`, `O1`, `O2` or `O3`.
        cast_model_type: what the weights are cast to for computing; None where operations decide (O1).
        patch_torch_functions: whether operations decide.
        keep_batchnorm_fp32: whether batch normalisation stays in float32; None leaves it to the policy.
        master_weights: whether there are float32 weights beside low precision ones.
        loss_scale: `dynamic`, or a number for good.
        enabled: always True; for scripts that look.

    >>> LEVELS["O2"].policy()
    '16-module'
    """

    opt_level: str
    cast_model_type: torch.dtype | None
    patch_torch_functions: bool
    keep_batchnorm_fp32: bool | None
    master_weights: bool | None
    loss_scale: str | float
    enabled: bool = True

    def policy(self) -> str:
        """The preset that these options come to, without what is said about batch normalisation."""
        if self.cast_model_type in (None, torch.float32):
            return "16-mixed" if self.patch_torch_functions else "32-true"
        low = "bf16" if self.cast_model_type is torch.bfloat16 else "16"
        return f"{low}-module" if self.master_weights else f"{low}-true"


LEVELS = {
    "O0": Options("O0", torch.float32, False, None, False, 1.0),
    "O1": Options("O1", None, True, None, None, "dynamic"),
    "O2": Options("O2", torch.float16, False, True, True, "dynamic"),
    "O3": Options("O3", torch.float16, False, False, False, 1.0),
}
"""The opt levels, by name."""


def read_options(opt_level: str, overrides: dict[str, Any]) -> Options:
    """Read an opt level and what a script overrides of it.

    Args:
        opt_level: `O0`, `O1`, `O2` or `O3`, with the letter O.
        overrides: by field of `Options`; None leaves the level's own. Text is taken for numbers, truth values and None,
            as it comes from command lines.

    Returns:
        The options.

    Raises:
        PolicyError: the level is unknown, or the override contradicts it.

    >>> read_options("O1", {"loss_scale": "128.0"}).loss_scale
    128.0
    """
    if opt_level not in LEVELS:
        hint = "write the letter O, not a zero" if opt_level in ("00", "01", "02", "03") else "write one of these"
        remedy = nearest(str(opt_level), LEVELS) + hint
        raise PolicyError(message("an opt_level: O0, O1, O2 or O3", f"opt_level={opt_level!r}", remedy=remedy))
    changes = {name: value for name, value in overrides.items() if value is not None and value != "None"}
    for name in ("keep_batchnorm_fp32", "master_weights"):
        if name in changes:
            changes[name] = _read_truth(name, changes[name])
    if "loss_scale" in changes:
        changes["loss_scale"] = _read_scale(changes["loss_scale"])
    if "cast_model_type" in changes:
        changes["cast_model_type"] = _read_type(opt_level, changes["cast_model_type"])
    if opt_level != "O1" and changes.get("patch_torch_functions"):
        raise _contradiction("patch_torch_functions=True with opt_level='O1' only", opt_level, "use opt_level='O1'")
    if opt_level == "O1" and changes.get("keep_batchnorm_fp32") is False:
        text = "batch normalisation in float32 with opt_level='O1', which always keeps it"
        raise _contradiction(text, opt_level, "leave keep_batchnorm_fp32 out, or use opt_level='O2'")
    return replace(LEVELS[opt_level], **changes)


def _contradiction(expected: str, level: str, remedy: str) -> PolicyError:
    return PolicyError(message(expected, f"an override that contradicts opt_level={level!r}", remedy=remedy))


def _read_truth(name: str, value: Any) -> bool:
    known = {True: True, False: False, "True": True, "False": False}
    if not isinstance(value, (bool, str)) or value not in known:
        remedy = f"write {name}=True, False or None"
        raise PolicyError(message(f"True or False for {name}", f"{name}={value!r}", remedy=remedy))
    return known[value]


def _read_scale(value: Any) -> str | float:
    if value == "dynamic":
        return "dynamic"
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        text = message("a loss_scale: 'dynamic' or a number", f"loss_scale={value!r}", remedy="write one of these")
        raise PolicyError(text) from error


def _read_type(level: str, value: Any) -> torch.dtype | None:
    if value is False:
        return None
    if value not in (torch.float32, torch.float16, torch.bfloat16):
        remedy = "write torch.float16, or leave it to the opt_level"
        raise PolicyError(message("a floating dtype as cast_model_type", f"cast_model_type={value!r}", remedy=remedy))
    if level == "O1" and value is not torch.float32:
        text = "float32 weights with opt_level='O1', where each operation decides"
        raise _contradiction(text, level, "leave cast_model_type out, or use opt_level='O2'")
    assert isinstance(value, torch.dtype)
    return value


def build_policy(options: Options, models: Sequence[nn.Module], outputs: torch.dtype | None) -> Policy:
    """Make the policy of the options.

    Args:
        options: what Apex would do.
        models: a rule for batch normalisation must match something in every one of them, or it is one to warn of.
        outputs: what floating outputs are cast to; None: float32, also where Apex left float16.

    Returns:
        The policy; its loss scale is `build_scale`'s.
    """
    policy = Policy.parse(options.policy())
    policy = replace(policy, output_dtype=outputs or torch.float32)
    if options.keep_batchnorm_fp32 is None or policy.param_dtype is torch.float32:
        # With float32 weights it stays in float32 in any case: its kernels take low precision activations as they are.
        return policy
    wanted = torch.float32 if options.keep_batchnorm_fp32 else policy.param_dtype
    has = [any(isinstance(module, _BATCH_NORM) for module in model.modules()) for model in models]
    if not any(has):
        return policy
    assert isinstance(wanted, torch.dtype)
    return replace(policy, rules=(Rule(_BATCH_NORM, wanted),), strict=all(has))


_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def build_scale(options: Options, least: float | None, most: float | None) -> LossScale | None:
    """Make the loss scale of the options: Apex's first scale, window and factors are those of torch.

    Args:
        options: what Apex would do.
        least: `min_loss_scale`; None is a floor of 1.0, where Apex had none.
        most: `max_loss_scale`.

    Returns:
        The loss scale; None where nothing is to be scaled.
    """
    if options.loss_scale == "dynamic":
        low = LossScale.min_scale if least is None else float(least)
        high = LossScale.max_scale if most is None else float(most)
        return LossScale(init_scale=max(min(LossScale.init_scale, high), low), min_scale=low, max_scale=high)
    number = float(options.loss_scale)
    if number == 1.0 and options.policy().endswith("-true"):
        return None
    return LossScale.static(number)
