"""Weights that a forward pre-hook computes from parameters: the older weight_norm and spectral_norm, and pruning.

Such a hook leaves its result as a plain attribute of the module, before forward is entered: inside the scope where a
parent has opened it, outside where the module itself is about to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from wrapprec import levels
from wrapprec.border import Border
from wrapprec.boundary import Lend
from wrapprec.dtypes import MIXABLE
from wrapprec.hooked import made_by_hooks
from wrapprec.lent import originals

if TYPE_CHECKING:
    from wrapprec.forward import Forward
    from wrapprec.scope import Scope
    from wrapprec.state import Shared


def computed_by_hooks(module: nn.Module) -> dict[str, str]:
    """`made_by_hooks`, of the module's own parameters, whatever is lent."""
    return made_by_hooks(module, originals(module))


class Computed:
    """The computed weights of one scope: cast, or brought over the border, until it closes.

    Where `parametrize.cached()` is on, the scope has a cache of its own. A weight that was computed inside is in low
    precision and its gradient is scaled: outside it must not be used, nor the other way round. Scopes under the same
    scale share theirs.

    Args:
        shared: of the model that opens the scope.
        border: the scope's.
    """

    def __init__(self, shared: Shared, border: Border | None) -> None:
        self.border = border
        self.replaced: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self.around: dict[Any, Any] | None = None
        if parametrize._cache_enabled:
            self.around = parametrize._cache
            scale = None if border is None else border.scale
            if shared.cache is None or shared.cache[0] is not self.around or shared.cache[1] is not scale:
                shared.cache = self.around, scale, {}
            parametrize._cache = shared.cache[2]
        elif shared.cache is not None:
            shared.cache = None

    def lend(self, forward: Forward, scope: Scope) -> None:
        """Cast the weights that hooks have computed for `forward`; one computed outside crosses the border."""
        for name, key in {name: key for key, name in forward.computed.items()}.items():
            weight = forward.module.__dict__.get(name)
            if not isinstance(weight, Tensor) or weight.dtype not in MIXABLE:
                continue
            dtype = None if weight.dtype is forward.lend_dtype else forward.lend_dtype
            node = weight.grad_fn
            # On a replica of nn.DataParallel that is called inside, the hook has found what was lent.
            outside = not scope.joins and (node is None or node._sequence_nr() < scope.extent.first)
            if self.border is not None and levels.requires_grad(weight) and outside:
                bucket = scope.shared.bucket_of(forward, key, forward.tree())
                self._replace(forward.module, name, Lend.apply(self.border, bucket, (dtype,), weight)[0])
            elif dtype is not None:
                self._replace(forward.module, name, weight.to(dtype))

    def _replace(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        self.replaced.append((module, name, module.__dict__[name], tensor))
        # Through `__setattr__`: an RNN keeps a list of its weights beside.
        setattr(module, name, tensor)

    def put_back(self) -> None:
        """Give the attributes back what they held, unless it is something new."""
        while self.replaced:
            module, name, before, tensor = self.replaced[-1]
            if module.__dict__.get(name) is tensor:
                setattr(module, name, before)
            self.replaced.pop()

    def close(self) -> None:
        """The scope closes; a second call does nothing."""
        self.put_back()
        if self.around is not None and parametrize._cache_enabled:
            parametrize._cache = self.around
        self.around = None
