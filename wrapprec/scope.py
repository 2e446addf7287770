"""Opening and closing a scope: lent weights, the scale border, and putting everything back.

The module of a wrapped model that is entered first on a thread opens the scope for its subtree, and the same call
closes it. The scope owns all that concerns the border with the user's loop; `region` casts inside it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.nn.parameter import UninitializedTensorMixin

from wrapprec import audit
from wrapprec.boundary import Border, Enter, Leave, Lend, Recompute
from wrapprec.bucket import Bucket
from wrapprec.cast import cast_tree, map_tensors, mend, tensors_in
from wrapprec.dtypes import LOW, MIXABLE, name
from wrapprec.errors import ModelChangedError, ScaleLeakError, StepError, message, module_label
from wrapprec.lent import Weights, lend, originals, take_back

if TYPE_CHECKING:
    from wrapprec.region import Forward
    from wrapprec.state import Shared


class _Thread(threading.local):
    def __init__(self) -> None:
        # In the instance's own dict from the start: dynamo guards on whether it is there.
        self.scope: Scope | None = None


thread = _Thread()
"""The innermost scope that this thread has open."""

Loan = tuple[nn.Module, Weights, "Weights | None"]


class Scope:
    """One entered forward of one wrapped model, on one thread.

    Args:
        shared: the wrapped model's state.
        recomputes: this is a checkpointed block of an earlier scope's inside, run again in backward.
    """

    def __init__(self, shared: Shared, recomputes: bool) -> None:
        self.shared = shared
        self.outer = thread.scope
        self.recomputes = recomputes
        # The region in force; None until the first is entered.
        self.region: Any = None
        self.done: set[int] = set()
        self.loans: list[Loan] = []
        self.memo: dict[tuple[int, torch.dtype | None], Tensor] = {}
        self.inputs: list[tuple[Tensor, Tensor, int]] = []
        self.sequence = _get_sequence_nr()
        self.border = self._border()

    def _border(self) -> Border | None:
        scaler = self.shared.scaler
        if scaler is None or not torch.is_grad_enabled():
            return None
        if self.recomputes:
            border: Border | None = scaler.borders.get(torch._C._current_graph_task_id())
            return border
        outer = self.outer
        while outer is not None and outer.border is None:
            outer = outer.outer
        return Border(scaler, None if outer is None else outer.border)

    # Weights

    def lend(self, tree: list[Forward]) -> None:
        """Lend the weights of `tree` in their compute dtype, through the scale border; what is lent already stays."""
        groups: dict[int, tuple[Bucket, list[tuple[Forward, str, Tensor, torch.dtype | None]]]] = {}
        frozen = self.shared.frozen if not torch.is_grad_enabled() else None
        lent: dict[int, tuple[Forward, Weights]] = {}
        # Under no_grad, too: code inside forward may enable gradients again.
        with torch.set_grad_enabled(frozen is None and not torch.is_inference_mode_enabled()):
            for forward in tree:
                if id(forward) in self.done:
                    continue
                self.done.add(id(forward))
                weights: Weights = {}
                for key, param in originals(forward.module).items():
                    if param is None or isinstance(param, UninitializedTensorMixin):
                        continue
                    dtype = forward.lend_dtype if frozen is None else forward.freeze_dtype
                    dtype = dtype if param.dtype in MIXABLE and param.dtype != dtype else None
                    border = self.border is not None and param.requires_grad
                    if dtype is None and not border:
                        continue
                    ready = self.memo.get((id(param), dtype))
                    if ready is not None:
                        weights[key] = ready
                    elif frozen is not None:
                        weights[key] = self._freeze(frozen, param, dtype)
                    elif not border and not (forward.multi_tensor and param.requires_grad):
                        weights[key] = self.memo[id(param), dtype] = param.to(dtype)
                    else:
                        bucket = self._bucket(forward, key, tree)
                        groups.setdefault(id(bucket), (bucket, []))[1].append((forward, key, param, dtype))
                if weights:
                    lent[id(forward)] = forward, weights
            for bucket, entries in groups.values():
                self._lend_bucket(bucket, entries, lent)
        for forward, weights in lent.values():
            self.loans.append((forward.module, weights, lend(forward.module, weights)))

    def _lend_bucket(
        self,
        bucket: Bucket,
        entries: list[tuple[Forward, str, Tensor, torch.dtype | None]],
        lent: dict[int, tuple[Forward, Weights]],
    ) -> None:
        fresh = {(id(p), d): (p, d) for _, _, p, d in entries if (id(p), d) not in self.memo}
        if fresh:
            dtypes = tuple(d for _, d in fresh.values())
            made = Lend.apply(self.border, bucket, dtypes, *(p for p, _ in fresh.values()))
            self.memo.update(zip(fresh, made, strict=True))
        for forward, key, param, dtype in entries:
            weight = self.memo[id(param), dtype]
            lent.setdefault(id(forward), (forward, {}))[1][key] = weight
            if self.shared.diagnosis is not None:
                self.shared.diagnosis.watch_weight(forward.name, key, weight)

    def _bucket(self, forward: Forward, key: str, tree: list[Forward]) -> Bucket:
        if key not in forward.buckets:
            root = None if self.shared.root is None else self.shared.root()
            self.shared.partition(tree if root is None else root.__dict__["forward"].tree())
            if key not in forward.buckets:
                self.shared.partition(tree)
        return forward.buckets[key]  # type: ignore[no-any-return]

    def _freeze(self, cache: dict[Any, Any], param: Tensor, dtype: torch.dtype | None) -> Tensor:
        assert dtype is not None
        if (id(param), dtype) not in cache:
            cache[id(param), dtype] = param, param.detach().to(dtype)
        frozen: Tensor = cache[id(param), dtype][1]
        return frozen

    # The border

    def enter(self, tree: Any) -> Any:
        """Put the border on the inputs that require grad."""
        border = self.border
        if border is None or self.recomputes:
            return tree

        def cross(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad or tensor.dtype not in MIXABLE:
                return tensor
            inside: Tensor = Enter.apply(tensor, border)
            self.inputs.append((tensor, inside, inside._version))
            return inside

        return map_tensors(cross, tree)

    def leave(self, forward: Forward, out: Any, given: Any) -> Any:
        """Cast the outputs to the output dtype, and put the border on all that leaves with a graph."""
        border = self.border
        if self.recomputes:
            return out if border is None else map_tensors(_once(lambda t: Recompute.apply(t, border)), out)
        dtype = forward.output_dtype
        if dtype is not None:
            out = cast_tree(out, dtype)
        if border is None:
            return out
        for before, inside, version in self.inputs:
            if inside._version != version and before.requires_grad:
                raise ModelChangedError(
                    message(
                        "a model that leaves its inputs as they are, or inputs that require no gradient",
                        f"an input of shape {tuple(before.shape)} that requires grad and was modified in place in forward",
                        where=module_label(forward.name, forward.module),
                        remedy="pass a copy: model(x.clone())",
                    )
                )
        start = self.sequence

        def cross(tensor: Tensor) -> Tensor:
            node = tensor.grad_fn
            if node is None or not _is_new(node, start):
                # A leaf or an older graph did not pass through this scope... unless it is given out by forward itself.
                return tensor
            left: Tensor = Leave.apply(tensor, border)
            return left

        once = _once(cross)
        out = map_tensors(once, out)
        out = _mend_opaque(once, out)
        _mend_opaque(once, given)
        for below in forward.tree():
            _mend_attributes(once, below.module)
        audit.prepare(self.shared.schedule, forward, out)
        return out

    def close(self) -> None:
        """Put everything back."""
        thread.scope = self.outer
        for module, weights, before in reversed(self.loans):
            take_back(module, weights, before)
        self.loans.clear()


def _is_new(node: Any, start: int) -> bool:
    return bool(node._sequence_nr() >= start)


def _once(fn: Any) -> Any:
    """Apply `fn` once to each tensor that requires grad, and give equal results for the same tensor."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    results: set[int] = set()

    def apply(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad or not tensor.is_floating_point() or id(tensor) in results:
            return tensor
        if id(tensor) not in made:
            result = fn(tensor)
            made[id(tensor)] = tensor, result
            results.add(id(result))
        return made[id(tensor)][1]

    return apply


_PLAIN = (Tensor, nn.Module, str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device)


def _mend_opaque(fn: Any, tree: Any) -> Any:
    """Put the border on tensors inside containers and objects, in place; plain tensors were dealt with already."""
    if isinstance(tree, tuple) and all(isinstance(item, _PLAIN) for item in tree):
        return tree
    return tree if isinstance(tree, _PLAIN) else mend(fn, tree)


_CONTAINERS = (list, tuple, dict, set)


def _mend_attributes(fn: Any, module: nn.Module) -> None:
    """Put the border on tensors that forward left in the attributes or buffers of `module`."""
    own = module.__dict__
    for key, value in own.items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                own[key] = fn(value)
        elif isinstance(value, _CONTAINERS) and value and key not in _MODULE_TABLES:
            after = mend(fn, value)
            if after is not value:
                own[key] = after
    buffers = own["_buffers"]
    for key, value in buffers.items():
        if value is not None and value.requires_grad:
            buffers[key] = fn(value)


_MODULE_TABLES = frozenset(nn.Module().__dict__) | {"_flat_weights", "_flat_weight_refs", "_flat_weights_names", "_all_weights"}


def leave(tensor: Tensor) -> Tensor:
    """Put the scale border on a tensor that leaves forward by another way than its outputs.

    Call it on an activation that a hook collects, or that a closure or a global keeps, before it is used in a loss:
    inside forward (in the hook) or afterwards.

    Args:
        tensor: any floating tensor of any shape.

    Returns:
        The same values, with true gradients; the tensor itself where no loss scale is on.

    Raises:
        ScaleLeakError: the tensor belongs to several scales at once.

    >>> import torch
    >>> leave(torch.ones(2))
    tensor([1., 1.])
    """
    if not tensor.requires_grad:
        return tensor
    scope = thread.scope
    if scope is not None:
        return tensor if scope.border is None else Leave.apply(tensor, scope.border)
    borders = audit.borders_below(tensor)
    if len({id(border.scale) for border in borders}) > 1:
        raise ScaleLeakError(
            message(
                "a tensor from inside one forward of one wrapped model",
                f"a tensor of shape {tuple(tensor.shape)} that depends on {len(borders)} of them",
                remedy="call wrapprec.leave on each activation where it is collected, inside forward",
            )
        )
    return Leave.apply(tensor, borders[0]) if borders else tensor


def check_pending(shared: Shared) -> None:
    """Raise for an overflow that no patched step could take notice of.

    Raises:
        StepError: gradients of a backward before held inf or nan and the weights were, or will be, stepped elsewhere.
    """
    orphans = [b for b in shared.pending() if not _alive(b) or b.changed()]
    if not orphans:
        return
    found = torch.stack([b.found for b in orphans if b.found is not None]).amax()
    for bucket in orphans:
        bucket.forget()
    if shared.backend.read(found)[0]:
        if shared.scaler is not None:
            shared.scaler.settle()
        raise StepError(
            message(
                "an optimizer whose step wrapprec can skip",
                "gradients with inf or nan, and an optimizer that wrapprec does not know (none was given to wrap, or it"
                " was rebuilt or copied since)",
                remedy="call handle.attach(optimizer) once it exists",
            )
        )


def _alive(bucket: Bucket) -> bool:
    return any(owner.alive for owner in bucket.owners)


def check_dtype(forward: Forward, key: str, param: Tensor) -> str | None:
    """Say what is wrong with a parameter that is trained in low precision under a mixed policy, or None."""
    if param.dtype not in LOW or not param.requires_grad:
        return None
    return message(
        "trainable parameters in float32 under a mixed policy",
        f"{name(param.dtype)} parameter {key!r} of shape {tuple(param.shape)}",
        where=module_label(forward.name, forward.module),
        remedy="call model.float() before the optimizer is built, or use the policy 'bf16-true'",
    )
