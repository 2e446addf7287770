"""The modules that stay in float32 unless a rule says otherwise, and why."""

from __future__ import annotations

import inspect
import re
import tokenize
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import batchnorm, instancenorm, loss, normalization
from torch.nn.parameter import is_lazy

NORM = "normalisation"
FOURIER = "fourier"
STRICTLY = "kept strictly by the Hugging Face model"

_TORCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    normalization.CrossMapLRN2d,
    batchnorm._NormBase,
    instancenorm._InstanceNorm,
)
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    NORM: _TORCH_NORMS,
    "softmax": (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.AdaptiveLogSoftmaxWithLoss),
    "loss": (loss._Loss,),
    "distance": (nn.PairwiseDistance, nn.CosineSimilarity),
}
_KEEPS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
_FOURIER = re.compile(r"\bi?[rh]?fft[n2]?\b|\bi?stft\b")
_SCATTERING = re.compile(r"\b(scatter(?:_\w+)?|index_add_?|index_reduce_?|segment_reduce)\s*\(")


def keeps_float32(fqn: str, module: nn.Module) -> str | None:
    """Say why a module stays in float32 by default, judged by its class alone.

    Args:
        fqn: its qualified name; classes decide, so it is not looked at.
        module: the module.

    Returns:
        `normalisation`, `softmax`, `loss`, `distance`, `fourier`, `message passing`, or None.

    >>> keeps_float32("norm", nn.LayerNorm(4)), keeps_float32("fc", nn.Linear(4, 4))
    ('normalisation', None)
    """
    for reason, kinds in _KINDS.items():
        if isinstance(module, kinds):
            return reason
    if _is_named_norm(module):
        return NORM
    kind: Any = type(module)  # mypy finds a Module class unhashable
    if _scatters_by_class(kind):
        return "message passing"
    return (
        FOURIER
        if not any(True for _ in nn.Module.named_parameters(module)) and _FOURIER.search(source_of(kind))
        else None
    )


def _is_named_norm(module: nn.Module) -> bool:
    """A leaf called `*Norm*` with vectors at most; PreNorm and LinearNorm are layers with a norm in them."""
    if "Norm" not in type(module).__name__ or module._modules:
        return False
    return all(p is None or is_lazy(p) or p.dim() <= 1 for p in module._parameters.values())


def _scatters_by_class(kind: Any) -> bool:
    """PyG's and torch-scatter's classes, known by name: neither package is imported for this."""
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package == "torch_scatter":
            return True
        if package == "torch_geometric" and base.__name__ in ("MessagePassing", "Aggregation"):
            return True
    return False


def keep_pattern(module: nn.Module, strict: bool = False) -> re.Pattern[str] | None:
    """Compile the names that a Hugging Face model wants kept in float32.

    Args:
        module: any module; `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict` are looked up on it.
        strict: look at the second alone.

    Returns:
        A pattern to search in a qualified name relative to `module`: it matches where the name ends with a listed
        one, dot by dot (a `*` in it stands for anything). None where nothing is listed.

    >>> model = nn.Module()
    >>> model._keep_in_fp32_modules = ["wo"]
    >>> pattern = keep_pattern(model)
    >>> bool(pattern.search("block.0.wo")), bool(pattern.search("block.0.two"))
    (True, False)
    """
    names: set[str] = set()
    for attribute in _KEEPS[1:] if strict else _KEEPS:
        listed = getattr(module, attribute, None)
        if isinstance(listed, str):
            names.add(listed)
        elif isinstance(listed, Iterable):
            names |= {name for name in listed if isinstance(name, str)}
    if not names:
        return None
    choices = "|".join(re.escape(name).replace(r"\*", ".*") for name in sorted(names))
    return re.compile(rf"(?:^|\.)(?:{choices})$")


def is_listed(fqn: str, module: nn.Module, pattern: re.Pattern[str]) -> bool:
    """Say whether a keep pattern means a module.

    Args:
        fqn: its name relative to the model that lists.
        module: the module.
        pattern: from `keep_pattern`.

    Returns:
        True if the pattern matches the module's name, or, for a leaf, that of a tensor it owns (a router's bias).

    >>> is_listed("gate", nn.Linear(2, 2), re.compile(r"(?:^|\\.)(?:bias)$"))
    True
    """
    if pattern.search(fqn):
        return True
    # A child without weights (an activation) makes no container of it.
    holds = any(True for child in module.children() for _ in nn.Module.named_parameters(child))
    own: dict[str, object] = {} if holds else {**module._parameters, **module._buffers}
    return any(pattern.search(f"{fqn}.{name}") for name, tensor in own.items() if tensor is not None)


def is_torch_norm(module: nn.Module) -> bool:
    """Say whether a module computes one of torch's own normalisations.

    Args:
        module: any module.

    Returns:
        True for torch's classes, and for subclasses that keep their `forward`.

    >>> is_torch_norm(nn.LayerNorm(4)), is_torch_norm(nn.Linear(4, 4))
    (True, False)
    """
    return isinstance(module, _TORCH_NORMS) and is_torch_own(module)


def is_torch_own(module: nn.Module) -> bool:
    """Say whether a module's forward is torch's own code.

    >>> is_torch_own(nn.Linear(4, 4))
    True
    """
    owner = next((kind for kind in type(module).__mro__ if "forward" in kind.__dict__), nn.Module)
    return owner.__module__.startswith("torch.nn.modules.")


def scatter_note(module: nn.Module) -> str | None:
    """Note that a module's own forward scatters: sums of many low-precision terms lose small ones.

    Args:
        module: any module.

    Returns:
        The note for the plan, or None; also None where the source cannot be read.

    >>> scatter_note(nn.Linear(2, 2)) is None
    True
    """
    kind: Any = type(module)
    if kind not in _notes:
        _notes[kind] = _scatter_note(kind)
    return _notes[kind]


_notes: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
"""By class, weakly: torch makes classes on the fly (parametrizations) that hold their module."""

_sources: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def source_of(kind: Any) -> str:
    """The source of a module's class; empty for torch's own, and where it cannot be read."""
    if kind not in _sources:
        _sources[kind] = _read_source(kind)
    return _sources[kind]


def _read_source(kind: Any) -> str:
    if kind.__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return ""


def _scatter_note(kind: Any) -> str | None:
    if kind.__module__.startswith("torch.nn.modules."):
        return None
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError, AttributeError, SyntaxError, tokenize.TokenError):
        return None
    found = _SCATTERING.search(source)
    if found is None:
        return None
    return f"its forward calls {found.group(1)}: if sums lose small terms, add a float32 rule for it"
