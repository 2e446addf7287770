"""The names of `apex.normalization`: torch's own layers, which are fused."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["FusedLayerNorm", "FusedRMSNorm", "MixedFusedLayerNorm", "MixedFusedRMSNorm"]


class FusedLayerNorm(nn.LayerNorm):
    """torch's LayerNorm.

    Args:
        normalized_shape: of the last dimensions.
        eps: added to the variance.
        elementwise_affine: whether it has parameters.
        memory_efficient: nothing.

    >>> FusedLayerNorm(4).eps
    1e-05
    """

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)


class FusedRMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with Apex's `eps`.

    Args:
        normalized_shape: of the last dimensions.
        eps: added to the mean square.
        elementwise_affine: whether it has parameters.
        memory_efficient: nothing.
    """

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)


MixedFusedLayerNorm = FusedLayerNorm
MixedFusedRMSNorm = FusedRMSNorm
