"""What is done with a GradScaler, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable

from wrapprec.migrate.rewrite.edits import Fork, Plan, argument_of, optimizer_step
from wrapprec.migrate.rewrite.facts import Flag, Scaler, constant, statement
from wrapprec.migrate.rewrite.names import Expression, Function, Names, Symbol
from wrapprec.migrate.rewrite.place import home
from wrapprec.migrate.rewrite.skips import Scales
from wrapprec.migrate.rewrite.syntax import cst, text


class Uses:
    """Reads every use of one scaler into a plan.

    Args:
        scaler: the scaler.
        plan: gets the edits, and the reasons against.
        names: of the file.
        spelled: the handle's name in the place of a scaler's.
    """

    def __init__(self, scaler: Scaler, plan: Plan, names: Names, spelled: Callable[[Expression], str]) -> None:
        self.scaler = scaler
        self.spelled = spelled
        self._plan = plan
        self._names = names
        self.family = names.family(scaler.symbol)
        self.optimizers: list[Symbol] = []
        self.functions: set[Function] = set()
        self.tests: list[tuple[cst.CSTNode, bool, cst.CSTNode]] = []
        """Questions whether there is a scaler: the test, whether it asks for one, and what asks."""
        self.handles: list[Expression] = []
        """The places where the handle stands instead."""
        self.passed: list[tuple[cst.Arg, Symbol]] = []
        self.aliases: list[tuple[cst.CSTNode, Symbol]] = []
        self._scales = Scales(plan, names, spelled)
        self.asked = self._scales.asked
        for symbol in self.family:
            for use in names.uses[symbol]:
                self.functions.add(names.function(use))
                self._read(use, symbol)
        for other in names.elsewhere(scaler.symbol):
            self.functions.add(names.function(other))
            plan.leave(other, f"`{text(other)}` may be the scaler, used from outside of its class")
        self._scales.finish()

    def _read(self, use: Expression, symbol: Symbol) -> None:
        names, plan = self._names, self._plan
        up = names.parent(use)
        if isinstance(up, (cst.AssignTarget, cst.AnnAssign)) or (isinstance(up, cst.Param) and up.name is use):
            return
        if isinstance(up, cst.Attribute) and up.value is use:
            call = names.parent(up)
            if isinstance(call, cst.Call) and call.func is up:
                self._method(up.attr.value, call, use)
            else:
                plan.leave(use, f"`{text(up)}` is used, which wrapprec's handle does not have")
        elif isinstance(up, cst.Arg):
            self._argument(up, use)
        elif isinstance(up, cst.Assign):
            targets = [names.symbol(target.target) for target in up.targets]
            if len(targets) == 1 and targets[0] is not None and targets[0] in self.family:
                self.aliases.append((up, targets[0]))
            else:
                plan.leave(up, "the scaler gets another name, which is set elsewhere too")
        else:
            self._test(use, up)

    def _method(self, method: str, call: cst.Call, use: Expression) -> None:
        known: dict[str, Callable[[cst.Call, Expression], None]] = {
            "scale": self._scale,
            "step": self._step,
            "unscale_": self._drop,
            "update": self._drop,
            "state_dict": lambda call, use: self.handles.append(use),
            "load_state_dict": lambda call, use: self.handles.append(use),
            "get_scale": self._read_scale,
        }
        if method in known:
            known[method](call, use)
        else:
            self._plan.leave(call, f"`{text(call.func)}` has no counterpart")

    def _read_scale(self, call: cst.Call, use: Expression) -> None:
        self.handles.append(use)
        self._scales.read(call, use)

    def _scale(self, call: cst.Call, use: Expression) -> None:
        if len(call.args) != 1 or call.args[0].star:
            self._plan.leave(call, "`scale` with other arguments than one")
        elif not self._goes_backward(call):
            self._plan.leave(
                call, "the scaled loss is used for more than backward(): the scale is not seen outside now"
            )
        else:
            self._plan.edits[call] = argument_of

    def _goes_backward(self, value: cst.CSTNode) -> bool:
        names = self._names
        up = names.parent(value)
        if isinstance(up, cst.Attribute):
            return up.attr.value == "backward"
        if isinstance(up, cst.Arg):
            above = names.parent(up)
            return isinstance(above, cst.Call) and names.qualified(above.func) == {"torch.autograd.backward"}
        if isinstance(up, cst.Assign) and len(up.targets) == 1:
            symbol = names.symbol(up.targets[0].target)
            if (
                symbol is None
                or home(symbol) is not names.function(up)
                or not isinstance(up.targets[0].target, cst.Name)
            ):
                return False
            loads = [one for one in names.uses[symbol] if not isinstance(names.parent(one), cst.AssignTarget)]
            other = isinstance(value, cst.Call) and names.symbol(value.args[0].value) != symbol
            return other and all(_is_backward(one, names) for one in loads)
        return False

    def _step(self, call: cst.Call, use: Expression) -> None:
        optimizer = self._names.symbol(call.args[0].value) if call.args and not call.args[0].star else None
        keyword = call.args[0].keyword if call.args else None
        if optimizer is None or (keyword is not None and keyword.value != "optimizer"):
            self._plan.leave(call, "the optimizer of this step is not a plain name")
            return
        self.optimizers += [one for one in sorted(self._names.roots(optimizer), key=lambda s: s[1])]
        self._plan.edits[call] = optimizer_step

    def _drop(self, call: cst.Call, use: Expression) -> None:
        up = self._names.parent(call)
        updates = text(call.func).endswith(".update")
        if not isinstance(up, cst.Expr) or (updates and call.args):
            self._plan.leave(call, f"`{text(call)}` sets or gives a value")
        else:
            self._plan.drop(up)

    def _argument(self, arg: cst.Arg, use: Expression) -> None:
        names = self._names
        call = names.parent(arg)
        called = names.called(call) if isinstance(call, cst.Call) else None
        if isinstance(call, cst.Call) and called is not None:
            bound = {id(value): name for name, value in names.bind(call, called).items()}
            if id(arg) in bound:
                symbol = names.symbol(names.parameter(called, bound[id(arg)]))
                if symbol is not None and symbol in self.family and symbol not in names.values:
                    self.passed.append((arg, symbol))
                    return
        name = text(call.func) if isinstance(call, cst.Call) else "a call"
        self._plan.leave(arg, f"the scaler goes to `{name}`, of which this file does not show what it does with it")

    def _test(self, use: Expression, up: cst.CSTNode | None) -> None:
        test: cst.CSTNode = use
        asks = True
        if isinstance(up, cst.Comparison) and len(up.comparisons) == 1 and up.left is use:
            target = up.comparisons[0]
            if constant(target.comparator) == "None" and isinstance(target.operator, (cst.Is, cst.IsNot)):
                asks = isinstance(target.operator, cst.IsNot)
                test, up = up, self._names.parent(up)
        if isinstance(up, cst.UnaryOperation) and isinstance(up.operator, cst.Not):
            asks = not asks
            test, up = up, self._names.parent(up)
        is_flag = isinstance(up, cst.Arg) and up.keyword is not None and up.keyword.value == "enabled"
        if (isinstance(up, (cst.If, cst.IfExp)) and up.test is test) or is_flag:
            assert up is not None
            self.tests.append((test, asks, up))
        else:
            self._plan.leave(use, "the scaler is used in a way that has no counterpart")


def _is_backward(use: cst.CSTNode, names: Names) -> bool:
    up = names.parent(use)
    return isinstance(up, cst.AssignTarget) or (isinstance(up, cst.Attribute) and up.attr.value == "backward")


def decide_tests(uses: Uses, always: bool, flag: Callable[[cst.CSTNode], str | None], plan: Plan) -> None:
    """Say what becomes of the questions whether there is a scaler.

    Args:
        uses: of the scaler.
        always: whether there always is one.
        flag: writes the scaler's own flag for the place of a node, None where it is not known there.
        plan: gets the edits.
    """
    for _, asks, asker in uses.tests:
        if isinstance(asker, cst.If):
            written = flag(asker)
            other = written if asks or written is None else f"not ({written})"
            plan.forks[asker] = Fork(("body" if asks else "else") if always else other)
        elif isinstance(asker, cst.IfExp):
            gives = asker.body if asks else asker.orelse
            rest = asker.orelse if asks else asker.body
            saves = isinstance(gives, cst.Call) and text(gives.func).endswith(".state_dict")
            if always or (saves and constant(rest) == "None"):
                plan.edits[asker] = _taker("body" if asks else "orelse")
            else:
                plan.leave(asker, "the choice depends on whether there is a scaler")


def _taker(side: str) -> Callable[[cst.CSTNode], cst.CSTNode]:
    return lambda updated: getattr(updated, side)


def scaler_flags(scaler: Scaler, stop: cst.CSTNode, names: Names) -> list[Flag]:
    """The flags of a scaler: its own, and those of the `if` statements between it and a block."""
    flags = list(scaler.enabled)
    below: cst.CSTNode = statement(scaler.call, names)
    for up in names.above(below):
        if up is stop:
            break
        if isinstance(up, cst.If) and up is not scaler.fork:
            flags.append(Flag(up.test, negated=below is up.orelse))
        below = up
    return flags
