"""What is done with a scaler's scale: printed, kept, or compared to see whether a step was skipped."""

from __future__ import annotations

from collections.abc import Callable

from wrapprec.migrate.rewrite.edits import Plan
from wrapprec.migrate.rewrite.facts import statement
from wrapprec.migrate.rewrite.names import Expression, Names, Symbol
from wrapprec.migrate.rewrite.syntax import cst


class Scales:
    """Reads the calls of `get_scale` of one scaler into a plan.

    Args:
        plan: gets the edits, and the reasons against.
        names: of the file.
        spelled: the handle's name in the place of a scaler's.
    """

    def __init__(self, plan: Plan, names: Names, spelled: Callable[[Expression], str]) -> None:
        self._plan = plan
        self._names = names
        self._spelled = spelled
        self._kept: dict[Symbol, cst.Assign] = {}
        self._calls: dict[cst.CSTNode, str] = {}
        self.asked: list[cst.CSTNode] = []
        """Where `scale` of the handle is read."""

    def read(self, call: cst.Call, use: Expression) -> None:
        """Take one call in."""
        up = self._names.parent(call)
        if isinstance(up, cst.Assign) and len(up.targets) == 1 and isinstance(up.targets[0].target, cst.Name):
            symbol = self._names.symbol(up.targets[0].target)
            if symbol is not None:
                self._kept[symbol] = up
        self._calls[call] = self._spelled(use)

    def finish(self) -> None:
        """Decide, when all calls are known."""
        compared: set[cst.CSTNode] = set()
        for comparison in [node for node in self._names.nodes if isinstance(node, cst.Comparison)]:
            sides = self._sides(comparison)
            if sides is not None:
                compared |= {comparison.left, comparison.comparisons[0].comparator}
                self._plan.write(comparison, sides)
        for symbol, kept in self._kept.items():
            loads = [
                use for use in self._names.uses[symbol] if not isinstance(self._names.parent(use), cst.AssignTarget)
            ]
            if loads and all(use in compared for use in loads):
                self._plan.drop(kept)
                compared.add(kept.value)
            for use in loads:
                if use not in compared:
                    self._check(use)
        for call, handle in self._calls.items():
            if call not in compared:
                self._check(call)
                self.asked.append(call)
                self._plan.write(call, f"{handle}.scale")

    def _check(self, node: cst.CSTNode) -> None:
        whole = statement(node, self._names)
        for up in self._names.above(node):
            if isinstance(up, (cst.BinaryOperation, cst.AugAssign)):
                words = "the scale is calculated with: gradients outside of the model are true, and have no scale"
                self._plan.leave(node, words)
                return
            if up is whole:
                return

    def _sides(self, comparison: cst.Comparison) -> str | None:
        """What a comparison of an earlier with a later scale says, if it is one."""
        if len(comparison.comparisons) != 1:
            return None
        target = comparison.comparisons[0]
        first, second = self._when(comparison.left), self._when(target.comparator)
        if first is None or second is None or first == second:
            return None
        falls = (cst.GreaterThan, cst.LessThanEqual) if first < second else (cst.LessThan, cst.GreaterThanEqual)
        if not isinstance(target.operator, falls):
            return None
        later = comparison.left if first > second else target.comparator
        symbol = self._names.symbol(later)
        call = later if symbol is None else self._kept[symbol].value
        skipped = f"{self._calls[call]}.step_was_skipped"
        return skipped if isinstance(target.operator, falls[0]) else f"not {skipped}"

    def _when(self, node: Expression) -> int | None:
        if node in self._calls:
            return self._names.line(node)
        symbol = self._names.symbol(node)
        kept = None if symbol is None else self._kept.get(symbol)
        if kept is None or len(self._names.values[symbol]) != 1:  # type: ignore[index]
            return None
        return self._names.line(kept)
