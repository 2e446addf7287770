"""The names of `apex.optimizers`: torch's fused optimizers with Apex's arguments, defaults and checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from wrapprec.errors import WrapprecError, message
from wrapprec.migrate.apex.masters import FP16_Optimizer
from wrapprec.migrate.apex.notes import note, refuse, refused

__all__ = ["FP16_Optimizer", "FusedAdagrad", "FusedAdam", "FusedLAMB", "FusedMixedPrecisionLamb", "FusedNovoGrad"]
__all__ += ["FusedSGD"]

FusedMixedPrecisionLamb = refused("optimizers.FusedMixedPrecisionLamb", "use FusedLAMB: the parameters stay float32")
FusedNovoGrad = refused(
    "optimizers.FusedNovoGrad",
    "use torch.optim.AdamW; timm's NvNovoGrad has the name, but another update: no bias correction, and weight decay"
    " within the moment",
)


class _Apex(Optimizer):
    """What Apex's optimizers do that torch's do not: zeroing, and one step count a group in their checkpoints."""

    def _set_up(self, name: str, stands_for: str, set_grad_none: bool) -> None:
        self._sets_none = set_grad_none
        note(f"apex.optimizers.{name} is {stands_for}")

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the gradients, or fill them with zeros where ``set_grad_none=False`` was asked for."""
        super().zero_grad(self._sets_none if set_to_none is None else set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint of torch's optimizer, or of Apex's."""
        groups, state = [], dict(state_dict["state"])
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            group = {**{key: value for key, value in mine.items() if key != "params"}, **saved}
            count = group.pop("step", None) if self._counts_by_parameter else None
            if count is not None:
                for key in group["params"]:
                    if key in state:
                        state[key] = {"step": torch.tensor(float(count)), **state[key]}
            groups.append(group)
        groups += state_dict["param_groups"][len(groups) :]  # torch says what does not fit
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        self._settle()

    def _settle(self) -> None:
        """Mend what was loaded."""

    _counts_by_parameter = True
    _sets_none = True


def _check(name: str, given: dict[str, Any], **required: Any) -> None:
    """Refuse arguments for which torch has no counterpart.

    Raises:
        WrapprecError: one has another value than the required one.
    """
    for key, value in required.items():
        if given.get(key, value) != value:
            remedy = f"leave {key} out ({value!r}), or write an optimizer of your own"
            raise refuse(f"optimizers.{name}", f"{key}={given[key]!r}", remedy)


def _listed(params: Iterable[Any]) -> tuple[list[Any], bool]:
    """The parameters or groups, and whether torch has a fused kernel where they all are."""
    groups: list[Any] = [
        {**item, "params": _as_list(item["params"])} if isinstance(item, dict) else item for item in params
    ]
    flat = [p for item in groups for p in (item["params"] if isinstance(item, dict) else [item])]
    tensors = [p[1] if isinstance(p, tuple) else p for p in flat]
    kinds = _get_fused_kernels_supported_devices()
    return groups, all(p.is_floating_point() and p.device.type in kinds for p in tensors)


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


_FAR = 2.0**30
"""A step count at which beta**step is zero: torch's bias correction divides by 1 then. It stays there in float32."""


class FusedAdam(_Apex, torch.optim.Adam):
    """torch's fused AdamW; Adam with ``adam_w_mode=False``.

    Args:
        params: parameters or groups.
        lr: the learning rate.
        bias_correction: False leaves the running averages as they are, as BERT's own Adam does.
        betas: coefficients of the running averages.
        eps: added to the denominator.
        adam_w_mode: weight decay apart from the gradient (AdamW), as by default in Apex.
        weight_decay: its coefficient.
        amsgrad: False, as in Apex.
        set_grad_none: what `zero_grad` does.
        capturable: for CUDA graphs.
        master_weights: nothing; parameters are float32.
        eps_inside_sqrt: False.
        max_grad_norm: each group's gradients are clipped to this norm; 0: not.

    Raises:
        WrapprecError: with amsgrad, or with eps inside of the square root.

    >>> optimizer = FusedAdam(torch.nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.5)
    >>> optimizer.param_groups[0]["decoupled_weight_decay"], optimizer.param_groups[0]["fused"]
    (True, True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        eps_inside_sqrt: bool = False,
        max_grad_norm: float = 0.0,
    ) -> None:
        _check("FusedAdam", locals(), amsgrad=False, eps_inside_sqrt=False)
        groups, fused = _listed(params)
        super().__init__(
            groups, lr, betas, eps, weight_decay, capturable=capturable, fused=fused or None,
            decoupled_weight_decay=bool(adam_w_mode),
        )  # fmt: skip
        self.defaults.update(bias_correction=bool(bias_correction), max_grad_norm=max_grad_norm)
        for group in self.param_groups:
            group.setdefault("bias_correction", bool(bias_correction))
            group.setdefault("max_grad_norm", max_grad_norm)
        self._set_up("FusedAdam", f"torch.optim.{'AdamW' if adam_w_mode else 'Adam'}(fused=True)", set_grad_none)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        new = [] if group["bias_correction"] else [p for p in group["params"] if not self.state.get(p)]
        out = super()._init_group(group, *lists)
        self._carry_far(new)
        return out

    def _carry_far(self, params: Iterable[torch.Tensor]) -> None:
        for param in params:
            if self.state.get(param):
                self.state[param]["step"].fill_(_FAR)

    def _settle(self) -> None:
        for group in self.param_groups:
            self._carry_far([] if group["bias_correction"] else group["params"])

    def step(self, closure: Any = None) -> Any:
        """Clip where `max_grad_norm` was given, and step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["max_grad_norm"] > 0:
                torch.nn.utils.clip_grad_norm_(group["params"], group["max_grad_norm"])
        super().step()
        return loss


class FusedSGD(_Apex, torch.optim.SGD):
    """torch's fused SGD.

    Args:
        params: parameters or groups.
        lr: the learning rate.
        momentum: its factor.
        dampening: of the momentum.
        weight_decay: an L2 penalty.
        nesterov: Nesterov's momentum.
        wd_after_momentum: False; torch adds weight decay before.
        materialize_master_grads: nothing; gradients are the parameters' own.
        set_grad_none: what `zero_grad` does; zeros by default, as in Apex.

    Raises:
        WrapprecError: with weight decay after momentum.

    >>> FusedSGD(torch.nn.Linear(2, 2).parameters(), lr=0.1).param_groups[0]["fused"]
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        _check("FusedSGD", locals(), wd_after_momentum=False)
        groups, fused = _listed(params)
        super().__init__(groups, lr, momentum, dampening, weight_decay, nesterov, fused=fused or None)
        self._set_up("FusedSGD", "torch.optim.SGD(fused=True)", set_grad_none)


class FusedAdagrad(_Apex, torch.optim.Adagrad):
    """torch's Adagrad, in its multi-tensor form: its fused kernel is for few devices.

    Args:
        params: parameters or groups.
        lr: the learning rate.
        eps: added to the denominator.
        weight_decay: an L2 penalty.
        set_grad_none: what `zero_grad` does.
        adagrad_w_mode: False; torch has no decoupled weight decay here.

    Raises:
        WrapprecError: with decoupled weight decay.

    >>> FusedAdagrad(torch.nn.Linear(2, 2).parameters()).defaults["eps"]
    1e-10
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
        adagrad_w_mode: bool = False,
    ) -> None:
        _check("FusedAdagrad", locals(), adagrad_w_mode=False)
        super().__init__(params, lr, weight_decay=weight_decay, eps=eps)
        self._set_up("FusedAdagrad", "torch.optim.Adagrad()", set_grad_none)


def FusedLAMB(
    params: Iterable[Any],
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    amsgrad: bool = False,
    adam_w_mode: bool = True,
    grad_averaging: bool = True,
    set_grad_none: bool = True,
    max_grad_norm: float = 1.0,
    use_nvlamb: bool = False,
) -> Any:
    """timm's Lamb, which computes what Apex's computes, clipping by the global norm included.

    Args:
        params: parameters or groups.
        lr: the learning rate.
        bias_correction: whether the running averages are corrected.
        betas: coefficients of the running averages.
        eps: added to the denominator.
        weight_decay: its coefficient.
        amsgrad: False, as in Apex.
        adam_w_mode: True; timm has no L2 penalty here.
        grad_averaging: whether the gradient is multiplied by 1 - beta1.
        set_grad_none: what `zero_grad` does.
        max_grad_norm: gradients are clipped to this global norm.
        use_nvlamb: adapt the learning rate without weight decay, too.

    Returns:
        The optimizer.

    Raises:
        WrapprecError: timm is not installed; or with an L2 penalty, or amsgrad.
    """
    _check("FusedLAMB", locals(), amsgrad=False, adam_w_mode=True)
    optimizer = _lamb()(
        params, lr, bias_correction, betas, eps, weight_decay, grad_averaging, max_grad_norm, always_adapt=use_nvlamb
    )
    optimizer._set_up("FusedLAMB", "timm.optim.Lamb()", set_grad_none)
    return optimizer


@functools.cache
def _lamb() -> Any:
    try:
        from timm.optim import Lamb  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        text = message(
            "timm, whose Lamb computes what apex.optimizers.FusedLAMB computes",
            f"{type(error).__name__}: {error}",
            remedy="pip install 'wrapprec[apex]', or use torch.optim.AdamW",
        )
        raise WrapprecError(text) from error
    return type("FusedLAMB", (_Apex, Lamb), {"_counts_by_parameter": False, "__doc__": Lamb.__doc__})
