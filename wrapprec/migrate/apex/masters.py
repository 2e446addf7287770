"""Float32 copies of float16 weights, a loss scale, and an optimizer that steps the copies: Apex's `FP16_Optimizer`.

Unlike a wrapped model, the weights here *are* float16 and their gradients are scaled; those of the copies are true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer

from wrapprec.errors import NonFiniteError, message
from wrapprec.migrate.apex.scalers import DynamicLossScaler, LossScaler, overflowed

__all__ = ["FP16_Optimizer", "master_params_to_model_params", "model_grads_to_master_grads"]


@torch.no_grad()
def model_grads_to_master_grads(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copy the gradients of a model to its float32 copies; they are as scaled as they were.

    Args:
        model_params: of the model.
        master_params: their copies, from `prep_param_lists`.
        flat_master: whether they are one flat tensor.
    """
    if flat_master:
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in model_params]
        master_params[0].grad = _flatten_dense_tensors(grads).to(master_params[0].dtype)
        return
    for param, master in zip(model_params, master_params, strict=True):
        master.grad = None if param.grad is None else param.grad.detach().clone().to(master.dtype)


@torch.no_grad()
def master_params_to_model_params(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copy float32 copies back to the model.

    Args:
        model_params: of the model.
        master_params: their copies.
        flat_master: whether they are one flat tensor.
    """
    if flat_master:
        master_params = _unflatten_dense_tensors(master_params[0], model_params)
    for param, master in zip(model_params, master_params, strict=True):
        param.copy_(master)


_PARTS = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


class FP16_Optimizer:
    """An optimizer of float32 copies of a model's float16 parameters, with a loss scale.

    Args:
        init_optimizer: any; from now on it has the copies, and parameters that are float32 already as they are.
        static_loss_scale: the loss scale, for good.
        dynamic_loss_scale: let it follow overflows instead.
        dynamic_loss_args: for `DynamicLossScaler`.
        verbose: print skipped steps.

    >>> model = nn.Linear(2, 1).half()
    >>> optimizer = FP16_Optimizer(torch.optim.SGD(model.parameters(), lr=1.0), static_loss_scale=128.0, verbose=False)
    >>> optimizer.backward(model(torch.ones(1, 2).half()).sum())
    >>> optimizer.param_groups[0]["params"][1].grad, model.bias.grad
    (tensor([1.]), tensor([128.], dtype=torch.float16))
    """

    def __init__(
        self,
        init_optimizer: Optimizer,
        static_loss_scale: float = 1.0,
        dynamic_loss_scale: bool = False,
        dynamic_loss_args: dict[str, Any] | None = None,
        verbose: bool = True,
    ) -> None:
        self.optimizer = init_optimizer
        self.verbose = verbose
        self.overflow = False
        self.dynamic_loss_scale = dynamic_loss_scale
        self.loss_scaler = (
            DynamicLossScaler(**(dynamic_loss_args or {})) if dynamic_loss_scale else LossScaler(static_loss_scale)
        )
        self.fp16_groups: list[list[Tensor]] = []
        self.fp32_from_fp16_groups: list[list[Tensor]] = []
        self.fp32_from_fp32_groups: list[list[Tensor]] = []
        for group in init_optimizer.param_groups:
            self._take(group)

    def _take(self, group: dict[str, Any]) -> None:
        """Put copies in the places of low precision parameters, with the state that they have."""
        low = [param for param in group["params"] if param.requires_grad and param.dtype != torch.float32]
        copies = {id(param): nn.Parameter(param.detach().clone().float()) for param in low}
        self.fp16_groups.append(low)
        self.fp32_from_fp16_groups.append([copies[id(param)] for param in low])
        self.fp32_from_fp32_groups.append([p for p in group["params"] if p.requires_grad and id(p) not in copies])
        group["params"] = [copies.get(id(param), param) for param in group["params"]]
        for param in low:
            state = self.optimizer.state.pop(param, None)
            if state:
                self.optimizer.state[copies[id(param)]] = {
                    key: value.float() if isinstance(value, Tensor) and value.dtype == param.dtype else value
                    for key, value in state.items()
                }

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        groups = zip(self.fp16_groups, self.fp32_from_fp16_groups, strict=True)
        return [pair for low, copies in groups for pair in zip(low, copies, strict=True)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer, with the copies."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """That of the optimizer, of the copies."""
        return self.optimizer.state

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by."""
        return self.loss_scaler.loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self.loss_scaler.cur_scale = value

    def zero_grad(self, set_grads_to_None: bool = False) -> None:
        """Zero the gradients of the copies and of the model.

        Args:
            set_grads_to_None: drop them instead.
        """
        self.optimizer.zero_grad(set_to_none=set_grads_to_None)
        for param, _ in self._pairs():
            if param.grad is not None and set_grads_to_None:
                param.grad = None
            elif param.grad is not None:
                param.grad = torch.zeros_like(param.grad)

    def backward(self, loss: Tensor, update_master_grads: bool = True, retain_graph: bool = False) -> None:
        """Differentiate the loss times the scale, and give the copies the true gradients.

        Args:
            loss: one number.
            update_master_grads: False leaves the second to a later call, where several losses accumulate.
            retain_graph: for another backward.
        """
        kept = self._set_aside()
        self.loss_scaler.backward(loss, retain_graph)
        self._unscale(kept)
        if update_master_grads:
            self.update_master_grads()

    def _set_aside(self) -> list[tuple[Tensor, Tensor]]:
        """Take the true gradients of float32 parameters away while scaled ones arrive."""
        params = [p for group in self.fp32_from_fp32_groups for p in group if p.grad is not None]
        kept = [(param, param.grad) for param in params]
        for param in params:
            param.grad = None
        return kept  # type: ignore[return-value]

    @torch.no_grad()
    def _unscale(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        for param in [p for group in self.fp32_from_fp32_groups for p in group if p.grad is not None]:
            param.grad.div_(self.loss_scale)  # type: ignore[union-attr]
        for param, grad in kept:
            param.grad = grad if param.grad is None else grad + param.grad

    @torch.no_grad()
    def update_master_grads(self) -> None:
        """Give the copies the model's gradients, unscaled, unless they overflowed."""
        pairs = self._pairs()
        same = [param for group in self.fp32_from_fp32_groups for param in group]
        self.overflow = overflowed([*(param for param, _ in pairs), *same])
        if self.overflow:
            return
        model_grads_to_master_grads([param for param, _ in pairs], [master for _, master in pairs])
        for _, master in pairs:
            if master.grad is not None:
                master.grad.div_(self.loss_scale)

    def clip_master_grads(self, max_norm: float, norm_type: float = 2) -> Any:
        """Clip the copies' gradients by their norm.

        Args:
            max_norm: the most.
            norm_type: of the norm.

        Returns:
            The norm before; -1 where they overflowed.
        """
        if self.overflow:
            return -1
        params = [param for group in self.param_groups for param in group["params"]]
        return nn.utils.clip_grad_norm_(params, max_norm, norm_type)

    def inspect_master_grad_data(self) -> list[list[Tensor | None]] | None:
        """The copies' gradients, a list for each group; None where they overflowed."""
        if self.overflow:
            return None
        return [[param.grad for param in group["params"]] for group in self.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Skip where gradients overflowed; otherwise step the copies, and copy them to the model.

        Args:
            closure: computes a loss, and calls `backward` of this optimizer.

        Returns:
            What the optimizer's step gives; None where it is skipped.

        Raises:
            NonFiniteError: gradients overflow in a closure at the smallest scale, too.
        """
        if closure is None:
            return self._step()
        out = self.optimizer.step(lambda: self._finite(closure))
        self._write_back()
        return out

    def _step(self) -> Any:
        scale = self.loss_scale
        self.loss_scaler.update_scale(self.overflow)
        if self.overflow:
            if self.verbose:
                print(f"OVERFLOW! Skipping step. Attempted loss scale: {scale}, reducing to {self.loss_scale}")
            return None
        out = self.optimizer.step()
        self._write_back()
        return out

    def _finite(self, closure: Callable[[], Any]) -> Any:
        """Evaluate a closure at the copies' values, again at lower scales while gradients overflow."""
        self._write_back()
        loss = closure()
        while self.overflow:
            if self.loss_scale <= 1.0:
                remedy = "look at the loss; it, or its gradients, are not finite in float16"
                raise NonFiniteError(message("finite gradients", "overflow at a loss scale of 1", remedy=remedy))
            self.loss_scaler.update_scale(True)
            loss = closure()
        self.loss_scaler.update_scale(False)
        return loss

    def _write_back(self) -> None:
        pairs = self._pairs()
        master_params_to_model_params([param for param, _ in pairs], [master for _, master in pairs])

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the model, the copies included: it loads with ``weights_only``."""
        scaler = {part: getattr(self.loss_scaler, part) for part in _PARTS if hasattr(self.loss_scaler, part)}
        return {
            "loss_scaler": scaler,
            "dynamic_loss_scale": self.dynamic_loss_scale,
            "overflow": self.overflow,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "fp32_from_fp16": [[copy.detach() for copy in group] for group in self.fp32_from_fp16_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume, from `state_dict` of this class, or of Apex's of the same name.

        Args:
            state_dict: the state; load the model's, too.
        """
        saved = state_dict["loss_scaler"]
        known = saved if isinstance(saved, dict) else vars(saved)
        self.dynamic_loss_scale = state_dict["dynamic_loss_scale"]
        self.loss_scaler = DynamicLossScaler() if self.dynamic_loss_scale else LossScaler()
        vars(self.loss_scaler).update({part: known[part] for part in _PARTS if part in known})
        self.overflow = state_dict["overflow"]
        self.optimizer.load_state_dict(state_dict["optimizer_state_dict"])
        with torch.no_grad():
            for group, values in zip(self.fp32_from_fp16_groups, state_dict["fp32_from_fp16"], strict=True):
                for copy, value in zip(group, values, strict=True):
                    copy.copy_(value)
        self._write_back()
