"""From Apex's amp: `initialize` becomes the line with `wrap`, and what drove the scale goes."""

from __future__ import annotations

from wrapprec.migrate.rewrite.edits import Fork, Plan, wrap_call
from wrapprec.migrate.rewrite.facts import argument, constant, is_module, mentions
from wrapprec.migrate.rewrite.names import Expression, Function, Names
from wrapprec.migrate.rewrite.place import spelled
from wrapprec.migrate.rewrite.syntax import cst, each, same, text
from wrapprec.migrate.rewrite.units import fresh

_SHIM = "wrapprec.migrate.apex has it: `from wrapprec.migrate.apex import amp`"
_FREE = {"num_losses", "verbosity", "patch_torch_functions", "keep_batchnorm_fp32"}
"""Keywords of `initialize` that have no counterpart and need none."""


def plan_apex(names: Names, package: str) -> list[Plan]:
    """Plan the edits of a file that uses Apex's amp, which keeps one state for the whole process: one group.

    Args:
        names: of the file.
        package: what wrapprec is called in it.
    """
    found: dict[str, list[cst.Call]] = {}
    plan = Plan()
    for node in names.nodes:
        if not isinstance(node, (cst.Name, cst.Attribute)):
            continue
        name = next((one for one in names.qualified(node) if one.startswith("apex.amp")), None)
        up = names.parent(node)
        if name is None or isinstance(up, cst.Attribute) or _is_import(node, names):
            continue
        part = name.removeprefix("apex.amp").removeprefix(".")
        if isinstance(up, cst.Call) and up.func is node and part in _READERS:
            found.setdefault(part, []).append(up)
        elif isinstance(up, cst.Call) and up.func is node and _is_half_anyway(part, up, names):
            plan.drop(names.parent(up))  # type: ignore[arg-type]  # the statement that it is
        else:
            plan.leave(node, f"`{text(node)}` has no counterpart here; {_SHIM}")
    if found and len(found.get("initialize", [])) != 1:
        calls = [call for several in found.values() for call in several]
        plan.leave(calls[0], f"there is not exactly one amp.initialize in this file; {_SHIM}")
    if found and not plan.reasons:
        _Apex(found, plan, names, package).read()
    return [plan] if plan.edits or plan.reasons else []


def _is_import(node: cst.CSTNode, names: Names) -> bool:
    return any(isinstance(up, (cst.Import, cst.ImportFrom)) for up in names.above(node))


def _is_half_anyway(part: str, call: cst.Call, names: Names) -> bool:
    """Whether a call registers what computes in float16 by the policy as well."""
    if part != "register_half_function" or len(call.args) != 2 or not isinstance(names.parent(call), cst.Expr):
        return False
    module, name = call.args
    return names.qualified(module.value) == {"torch"} and constant(name.value) in _HALF_ANYWAY


_HALF_ANYWAY = {"addbmm", "addmm", "addmv", "baddbmm", "bmm", "chain_matmul", "einsum", "matmul", "mm", "mv"}
"""Products, which autocast rounds: https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float16."""
_READERS = {"initialize", "scale_loss", "master_params", "state_dict", "load_state_dict"}


class _Apex:
    def __init__(self, found: dict[str, list[cst.Call]], plan: Plan, names: Names, package: str) -> None:
        self._found = found
        self._plan = plan
        self._names = names
        self._package = package
        (self._init,) = found["initialize"]
        self._where: Function = names.function(self._init)
        self._handle = fresh("handle", names)
        self._is_needed = False

    def read(self) -> None:
        """Plan every use."""
        for call in self._found.get("scale_loss", []):
            self._scale_loss(call)
        for call in self._found.get("master_params", []):
            self._master_params(call)
        for name in ("state_dict", "load_state_dict"):
            for call in self._found.get(name, []):
                self._state(call, name)
        self._initialize()

    def _initialize(self) -> None:
        plan, call = self._plan, self._init
        plan.serves = {one for arg in call.args[:2] for one in mentions(arg, self._names)}
        assign = self._names.parent(call)
        models, optimizers = argument(call, "models", 0), argument(call, "optimizers", 1)
        if any(arg.star for arg in call.args) or models is None or not isinstance(assign, cst.Assign):
            plan.leave(call, "amp.initialize is not called as `model, optimizer = amp.initialize(model, optimizer)`")
            return
        has_optimizers = optimizers is not None and constant(optimizers) != "None"
        wanted = [models, optimizers] if has_optimizers else [models]
        target = assign.targets[0].target
        given = [one.value for one in target.elements] if has_optimizers and isinstance(target, cst.Tuple) else [target]
        if len(assign.targets) != 1 or len(given) != len(wanted) or not all(map(_alike, given, wanted)):
            plan.leave(call, "amp.initialize gives other names than it gets: what is wrapped is not plain to see")
            return
        keywords = self._keywords()
        if keywords is None:
            return
        level = argument(call, "opt_level", 3)
        policy = '"O1"' if level is None else text(level)
        parts = [text(one) for one in wanted if one is not None]
        parts.append(policy if has_optimizers else f"policy={policy}")
        code = wrap_call(self._package, [*parts, *keywords], self._handle if self._is_needed else "")
        line = cst.parse_statement(code + "\n")
        assert isinstance(line, cst.SimpleStatementLine)
        small = line.body[0]
        plan.edits[assign] = lambda updated: small
        plan.wraps = True

    def _keywords(self) -> list[str] | None:
        """The keywords for `wrap`; None, with the reason in the plan, where one has no counterpart."""
        plan, call = self._plan, self._init
        written: list[str] = []
        bounds: list[str] = []
        scale: str | None = None
        for arg in call.args[2:]:
            name = "enabled" if arg.keyword is None else arg.keyword.value
            value = constant(arg.value)
            if arg.keyword is None and arg is not call.args[2]:
                name = "opt_level" if arg is call.args[3] else "?"
            if name in ("models", "optimizers", "opt_level") or (name == "enabled" and value == "True"):
                continue
            if name == "keep_batchnorm_fp32" and value != "True" and value != "None":
                plan.note(arg, "normalisation always keeps float32 parameters and statistics now")
            if name in _FREE or value == "None":
                continue
            if name == "master_weights" and value == "True":
                continue  # the parameters are the master weights
            if name == "cast_model_outputs" and text(arg.value) in ("torch.float32", "torch.float"):
                continue  # outputs are float32 anyway
            if name == "enabled":
                written.append(f"enabled={text(arg.value)}")
            elif name == "loss_scale":
                scale = text(arg.value)
            elif name in ("min_loss_scale", "max_loss_scale"):
                bounds.append(f"{name.replace('_loss', '')}={text(arg.value)}")
            else:
                plan.leave(arg, f"amp.initialize({name}=...) has no counterpart; {_SHIM}")
                return None
        if bounds and scale in (None, '"dynamic"', "'dynamic'"):
            scale = f"{self._package}.LossScale({', '.join(bounds)})"
        if scale not in (None, '"dynamic"', "'dynamic'"):
            written.append(f"loss_scale={scale}")
        return written

    def _scale_loss(self, call: cst.Call) -> None:
        plan, names = self._plan, self._names
        item = names.parent(call)
        holder = None if item is None else names.parent(item)
        scaled = item.asname.name if isinstance(item, cst.WithItem) and item.asname is not None else None
        if not isinstance(holder, cst.With) or not isinstance(scaled, cst.Name) or not call.args or item is None:
            plan.leave(call, "amp.scale_loss is not used as `with amp.scale_loss(loss, optimizer) as scaled_loss:`")
            return
        symbol = names.symbol(scaled)
        inside = set(each(holder.body))
        used = [node for node in inside if isinstance(node, cst.Name) and names.symbol(node) == symbol]
        loss = call.args[0].value
        plain = isinstance(loss, (cst.Name, cst.Attribute))
        if any(not _calls_backward(use, names) for use in used) or (len(used) != 1 and not plain):
            plan.leave(call, "the scaled loss is used for more than one backward(): the scale is not seen outside now")
            return
        code = text(loss)
        atom = plain or isinstance(loss, (cst.Call, cst.Subscript)) or loss.lpar
        for use in used:
            plan.write(use, code if atom else f"({code})")
        plan.drop(item)
        for up in names.above(holder):
            if isinstance(up, cst.FunctionDef):
                break
            if isinstance(up, cst.If) and up.orelse is not None:
                plan.forks.setdefault(up, Fork("keep"))

    def _master_params(self, call: cst.Call) -> None:
        names = self._names
        optimizer = call.args[0].value if len(call.args) == 1 else None
        if optimizer is None:
            self._plan.leave(call, "amp.master_params with other arguments than one optimizer")
            return
        code = f"[p for group in {text(optimizer)}.param_groups for p in group['params']]"
        symbol = names.symbol(optimizer)
        for root in names.roots(symbol) if symbol is not None else ():
            made = [one for _, one in names.values.get(root, []) if isinstance(one, cst.Call) and one is not self._init]
            model = _whole_model(made, names)
            known = None if model is None else spelled(model, names.function(call), names.line(call), names)  # type: ignore[arg-type]
            code = code if known is None else f"{known}.parameters()"
        self._plan.write(call, code)

    def _state(self, call: cst.Call, method: str) -> None:
        names, plan = self._names, self._plan
        function = names.function(call)
        if method == "load_state_dict":
            plan.note(
                call, "a checkpoint that Apex wrote has a form of its own: load its scale by wrapprec.migrate.apex"
            )
        tests = [text(up.test) for up in names.above(self._init) if isinstance(up, cst.If)]
        here = [text(up.test) for up in names.above(call) if isinstance(up, cst.If)]
        reachable = function is self._where and names.line(call) > names.line(self._init)
        if not (reachable or (self._where is None and function is not None)) or not set(tests) <= set(here) | _MAIN:
            plan.leave(call, "the handle would not be at hand here")
            return
        self._is_needed = True
        plan.write(call.func, f"{self._handle}.{method}")


_MAIN = {'__name__ == "__main__"', "__name__ == '__main__'"}


def _alike(one: Expression, other: Expression | None) -> bool:
    if isinstance(one, (cst.List, cst.Tuple)) and isinstance(other, (cst.List, cst.Tuple)):
        pairs = zip(one.elements, other.elements, strict=False)
        return len(one.elements) == len(other.elements) and all(same(a.value, b.value) for a, b in pairs)
    return other is not None and same(one, other)


def _calls_backward(use: cst.CSTNode, names: Names) -> bool:
    up = names.parent(use)
    return isinstance(up, cst.Attribute) and up.attr.value == "backward"


def _whole_model(made: list[cst.Call], names: Names) -> object:
    """The model all of whose parameters an optimizer gets, and nothing else."""
    first = made[0].args[0].value if len(made) == 1 and made[0].args else None
    if not isinstance(first, cst.Call) or first.args or not isinstance(first.func, cst.Attribute):
        return None
    symbol = names.symbol(first.func.value)
    if first.func.attr.value != "parameters" or symbol is None or not is_module(symbol, names):
        return None
    roots = names.roots(symbol)
    return next(iter(roots)) if len(roots) == 1 else None
