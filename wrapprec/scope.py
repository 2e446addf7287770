"""Opening and closing a scope: lent weights, the scale border, and putting everything back.

The module of a wrapped model that is entered first on a thread opens the scope for its subtree, and the same call
closes it. The scope owns all that concerns the border with the user's loop; `region` casts inside it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wrapprec import audit, levels
from wrapprec.border import Border
from wrapprec.boundary import Enter, Inward, Lend, Recompute
from wrapprec.bucket import has_hooks
from wrapprec.carried import Carried, any_widened, note_widened
from wrapprec.cast import map_tensors, tensors_in
from wrapprec.census import left_to_lend
from wrapprec.checks import check_inputs, check_weights, version_of
from wrapprec.computed import Computed
from wrapprec.current import thread
from wrapprec.dtypes import MIXABLE
from wrapprec.escape import map_outputs, mend_attributes, mend_given, mend_opaque, once
from wrapprec.gathered import bring
from wrapprec.lent import Awaited, Later, Weights, freeze, joining, lend, originals, take_back
from wrapprec.modes import Modes
from wrapprec.outward import cross_out
from wrapprec.ranks import at_end_of_backward, take_reduced
from wrapprec.recompute import Extent, remember

if TYPE_CHECKING:
    from wrapprec.forward import Forward

Loan = tuple[nn.Module, Weights]

Entry = tuple["Forward", str, Tensor, "torch.dtype | None"]
"""A weight to lend: whose it is, its name there, the parameter, and the dtype to cast it to."""


class Scope:
    """One entered forward of one wrapped model, on one thread.

    Args:
        opener: of the module that was entered first.
        part_of: the extent of the earlier scope of whose inside this is a recomputed, checkpointed block; None for a
            scope of its own.
        known: the border of that earlier scope, where it is known.
        joined: the border of the scope, open on another thread, of which this one is a part: nn.DataParallel is wrapped
            and calls its replicas.
    """

    def __init__(
        self, opener: Forward, part_of: Extent | None, known: Border | None = None, joined: Border | None = None
    ) -> None:
        self.opener = opener
        self.shared = opener.shared
        self.outer = thread.scope
        self.joins = joined is not None
        self.recomputes = part_of is not None or self.joins
        # The region in force; None until the first is entered.
        self.region: Any = None
        self.mending: Any = None  # the mode that mends operations of the module that is running
        # Whose weights are lent, and those of them of which a call in the same region needs nothing else.
        self.done: set[Forward] = set()
        self.simple: frozenset[Forward] = frozenset()
        self.loans: list[Loan] = []
        self.memo: dict[tuple[int, torch.dtype | None], Tensor] = {}
        # Weights lent as copies, and their versions: forward must not write into them.
        self.copies: list[tuple[Forward, str, Tensor, int]] = []
        self.inputs: list[tuple[Tensor, Tensor, int]] = []
        # Inputs made on other threads: by their nodes' numbers they only look as if they were made inside.
        self.foreign: dict[int, Tensor] = {}
        self.extent = Extent()
        self.grad = torch.is_grad_enabled()
        self.modes = Modes()
        # Tensors may be wrappers with a graph for each level, and forward has tangents to compute.
        self.functional = self.modes.transforms > 0 or levels.differentiates_forward()
        self.suspended = False  # part of it ran under no_grad: a reentrant checkpoint may recompute it
        # What forward hooks were given, and may make leaves of.
        self.watched: list[Tensor] = []
        self.carried: Carried | None = None
        known = known or joined
        self.border = self._border(part_of) if known is None else known.again(self.extent)
        self.computed = Computed(self.shared, self.border)

    def _border(self, part_of: Extent | None) -> Border | None:
        scaler = self.shared.scaler
        if scaler is None or not self.grad:
            return None
        if part_of is not None:
            entered = list(scaler.borders.get(torch._C._current_graph_task_id(), {}).values())
            known = next((border for border in entered if border.extent is part_of), None)
            return None if known is None else known.again(self.extent)
        outer = self.outer
        while outer is not None and outer.border is None:
            outer = outer.outer
        border = Border(scaler, None if outer is None else outer.border, self.extent, self.functional)
        self.shared.ranks.meet()
        if self.shared.ranks.joining:
            border.at_begin = functools.partial(at_end_of_backward, functools.partial(take_reduced, self.shared))
        return border

    def lend(self, tree: list[Forward]) -> None:
        """Lend the weights of `tree` in their compute dtype, through the scale border; what is lent already stays."""
        frozen = self.shared.lendable()
        groups: dict[int, list[Entry]] = {}
        replicas: list[Loan] = []
        for forward in left_to_lend(self, tree, frozen is not None):
            made_of = forward.computed
            weights: Weights = {}
            replica = forward.replica
            for key, param in (originals(forward.module) if replica is None else replica.params).items():
                if param is None:
                    continue
                if type(param) is not nn.Parameter and is_lazy(param):
                    # It gets its shape when its module is called, just before its forward.
                    self.done.discard(forward)
                    continue
                if forward.managed and key in forward.managed:
                    weights |= bring(self, forward, key, forward.managed[key], key not in made_of)
                    continue
                low = forward.lend_dtype if frozen is None else forward.freeze_dtype
                now = param.dtype
                dtype = low if now is not low and now in MIXABLE and key not in made_of else None
                border = self.border is not None and self._differentiates(param)
                if dtype is None and not border:
                    continue
                entry = forward, key, param, dtype
                if param.is_meta:
                    weights[key] = Awaited(dtype)
                elif frozen is not None and replica is None:
                    weights[key] = freeze(frozen, param, dtype)
                elif not border and not (param.requires_grad and (forward.multi_tensor or forward.sparse)):
                    weights[key] = Later(functools.partial(self._lend_one, entry))
                else:
                    bucket = self.shared.bucket_of(forward, key, tree)
                    group = groups.setdefault(id(param if has_hooks(param) else bucket), [])
                    group.append(entry)
                    weights[key] = Later(functools.partial(self._lend_bucket, bucket, group, entry))
            if weights:
                self.loans.append((forward.module, weights))  # first: an interrupt in between leaves nothing lent
                if replica is None:
                    lend(forward.module, weights)
                else:
                    replicas.append(self.loans[-1])
        for module, weights in replicas:
            lend(module, weights)

    def _differentiates(self, tensor: Tensor) -> bool:
        """Gradients may come back to the tensor; to tangents, which do not show, whatever comes in."""
        if tensor.requires_grad or not self.functional:
            return tensor.requires_grad
        return tensor.is_floating_point() and (levels.differentiates_forward() or levels.requires_grad(tensor))

    def _lend_one(self, entry: Entry) -> Tensor:
        forward, key, param, dtype = entry
        made = self.memo.get((id(param), dtype))
        if made is None:
            assert dtype is not None
            with self.modes.restore(), joining:
                made = self.memo[id(param), dtype] = param.to(dtype)
            self.copies.append((forward, key, made, version_of(made)))
        return made

    def _lend_bucket(self, bucket: Any, entries: list[Entry], wanted: Entry) -> Tensor:
        known = self.memo.get((id(wanted[2]), wanted[3]))
        if known is not None:
            return known
        fresh = {(id(p), d): (p, d) for _, _, p, d in entries if (id(p), d) not in self.memo}
        with self.modes.restore(), joining:
            made = Lend.apply(self.border, bucket, tuple(d for _, d in fresh.values()), *(p for p, _ in fresh.values()))
        self.memo.update(zip(fresh, made, strict=True))
        for forward, key, param, dtype in entries:
            weight = self.memo[id(param), dtype]
            if dtype is not None:
                self.copies.append((forward, key, weight, version_of(weight)))
            if self.shared.diagnosis is not None:
                self.shared.diagnosis.watch_weight(forward.name, key, weight)
        return self.memo[id(wanted[2]), wanted[3]]

    def enter(self, forward: Forward, tree: Any) -> Any:
        """Put the border on the inputs that require grad, and on what else comes in."""
        border = self.border
        if self.recomputes or (border is None and not any_widened()):
            return tree
        self.carried = Carried(self, forward)
        self.carried.bring_in(tree)
        if border is None:
            return tree
        self.carried.bring_in_attributes(forward.tree(), self.shared.enter_thread())

        def come_in(tensor: Tensor) -> Tensor:
            if not self._differentiates(tensor):
                return tensor
            if tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= self.extent.first:
                self.foreign[id(tensor)] = tensor
            inside: Tensor = Enter.apply(tensor, border)
            self.inputs.append((tensor, inside, inside._version))
            return inside

        return map_tensors(come_in, tree)

    def enter_again(self, objects: list[Any]) -> None:
        """Put the border on what comes in otherwise, for a recomputation: `objects` were given to the original run."""
        if self.border is None and not any_widened():
            return
        self.carried = Carried(self, self.opener)
        # What they held when the original scope closed was put back, or has left.
        self.carried.bring_in(objects)
        if self.border is not None:
            self.carried.bring_in_attributes(self.opener.tree(), len(self.shared.threads) <= 1)

    def leave(self, forward: Forward, out: Any, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """Cast the outputs to the output dtype, and put the border on all that leaves with a graph."""
        if self.recomputes:
            return self.leave_again(out)
        self._finish()
        border = self.border
        scaler = self.shared.scaler
        dtype = forward.output_dtype
        if dtype is not None and not (isinstance(out, Tensor) and out.dtype is dtype):
            out = map_outputs(lambda tensor: tensor.to(dtype) if tensor.dtype in MIXABLE else tensor, out)
        carried = self.carried
        if border is None or scaler is None or carried is None:
            return out
        check_inputs(self.inputs, forward)
        foreign, start, strict, widened = self.foreign, self.extent.first, False, False

        def go_out(tensor: Tensor) -> Tensor:
            nonlocal widened
            if id(tensor) in foreign:
                return tensor
            left = cross_out(carried.original(tensor), border, start, strict)
            widened = widened or left.dtype is not tensor.dtype
            return left

        cross = once(go_out)
        out = map_outputs(cross, out)
        # What stands in objects may be another thread's.
        strict = len(self.shared.threads) > 1
        out = mend_opaque(cross, out)
        mend_given(cross, *given)
        if widened:
            note_widened((out, given))
        doubtful = carried.doubtful
        seen: set[int] = set()
        for below in forward.tree():
            holders = mend_attributes(cross, below.module, seen)
            if holders:
                known = self.shared.holders.setdefault(below.name, set())
                doubtful = doubtful or not known.issuperset(holders)
                known.update(holders)
        inner = (below.module for below in forward.tree() if below is not forward)
        schedule = self.shared.schedule
        border.audited = audit.prepare(schedule, scaler, forward, out, schedule.has_new_hooks(inner) or doubtful)
        return out

    def leave_again(self, out: Any) -> Any:
        """Tell the backward of a recomputed block, on its outputs, which S is in force; nothing else changes."""
        self._finish()
        border = self.border
        return out if border is None else map_tensors(once(lambda t: Recompute.apply(t, border)), out)

    def _finish(self) -> None:
        if self.copies:
            check_weights(self.copies)
        if self.watched:
            self.look_at_watched()
        if self.computed.replaced:
            self.computed.put_back()

    def look_at_watched(self) -> None:
        """Put the border on the leaves that forward hooks have made of outputs, by requires_grad_()."""
        for tensor in self.watched:
            if tensor.requires_grad and tensor.is_leaf and self.border is not None:
                tensor.register_hook(Inward(self.border))
        self.watched = []

    def watch(self, out: Any) -> Any:
        """Note the outputs of a module that has forward hooks, before those run."""
        self.watched += [t for t in tensors_in(out) if not t.requires_grad and not t.is_inference()]
        return out

    def close(self) -> None:
        """Put everything back; called again after an interrupt, it goes on where it was."""
        self.computed.close()
        while self.loans:
            take_back(*self.loans[-1])
            self.loans.pop()
        if self.carried is not None:
            self.carried.put_back()
        self.extent.end()
        if self.suspended and self.border is None and not self.recomputes:
            remember(self.shared, self.extent)
        thread.scope = self.outer
