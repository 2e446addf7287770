"""Finds the parameters from which a forward pre-hook computes a weight: weight_norm, spectral_norm, pruning."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_SUFFIXES = ("_g", "_v", "_orig", "_raw", "_bar")
"""What the parameters that a weight is computed from are called, after its own name; the last two by users."""


def made_by_hooks(module: nn.Module, params: Mapping[str, Tensor | None]) -> dict[str, str]:
    """The weights that hooks compute, known by the name that the hook object holds.

    Args:
        module: its pre-hooks are looked at; functions compute nothing that could be known.
        params: its own parameters.

    Returns:
        By the name of each parameter that goes into a computed weight, the name of that weight.

    >>> layer = nn.utils.spectral_norm(nn.Linear(2, 2))
    >>> made_by_hooks(layer, layer._parameters)
    {'weight_orig': 'weight'}
    """
    found: dict[str, str] = {}
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if isinstance(name, str) and name not in params:
            # Whether the module has such an attribute is not asked: dynamo would have to look at what it holds.
            found |= {name + suffix: name for suffix in _SUFFIXES if params.get(name + suffix) is not None}
    return found
