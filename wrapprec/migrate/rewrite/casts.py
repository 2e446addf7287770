"""How autocast is used: which code runs under it, which models that code calls, and under which flags."""

from __future__ import annotations

from dataclasses import dataclass, field

from wrapprec.migrate.rewrite import makers
from wrapprec.migrate.rewrite.facts import (
    AUTOCAST,
    Cast,
    Flag,
    Reason,
    cast_of,
    choose,
    constant,
    is_module,
    is_module_class,
    is_partial,
    mentions,
    statement,
)
from wrapprec.migrate.rewrite.names import Expression, Function, Names, Symbol
from wrapprec.migrate.rewrite.syntax import cst, each, text

NOT_FORWARD = set(
    """
    parameters named_parameters buffers named_buffers modules named_modules children named_children state_dict
    load_state_dict train eval to cuda cpu float requires_grad_ zero_grad apply no_sync configure_optimizers
    register_buffer register_forward_hook register_comm_hook share_memory module compile get_num_params
    estimate_mfu crop_block_size set_epoch __class__ half bfloat16 double
    """.split()  # noqa: SIM905  # a word list reads better
)


@dataclass(eq=False)
class Region:
    """Code under one autocast.

    Args:
        cast: the autocast.
        item: the `with` item, or the decorator.
        code: what runs under it.
        function: where.
        models: the roots of the modules that it calls.
        flags: all that must hold for the cast to take place.
        inside: the module class whose own code this is, if it is.
        forks: the `if` statements that choose between this and the same without autocast.
    """

    cast: Cast
    item: cst.WithItem | cst.Decorator
    code: cst.CSTNode
    function: Function
    models: set[Symbol] = field(default_factory=set)
    flags: list[Flag] = field(default_factory=list)
    inside: cst.ClassDef | None = None
    forks: list[cst.If] = field(default_factory=list)


@dataclass
class Casts:
    """All autocasts of a file; the reasons are of uses that are not understood."""

    casts: list[Cast] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)


def read_casts(names: Names) -> Casts:
    """Find every autocast of a file, and the code under it."""
    found = Casts()
    for node in names.nodes:
        cast = cast_of(node, names) if isinstance(node, cst.Call) else None
        if cast is not None:
            found.casts.append(cast)
            _follow(cast, found, names)
        elif isinstance(node, (cst.Name, cst.Attribute)) and names.qualified(node) & AUTOCAST:
            up = names.parent(node)
            inner = isinstance(up, (cst.ImportAlias, cst.Attribute)) or any(
                isinstance(one, (cst.Import, cst.ImportFrom)) for one in names.above(node)
            )
            made = isinstance(up, cst.Call) and up.func is node
            made = made or (isinstance(up, cst.Arg) and is_partial(names.parent(up), names))
            if not inner and not made and not names.aliases(up, node):
                found.reasons.append(Reason(node, _passed_on(node, up, names)))
    for region in found.regions:
        _look_around(region, names)
    return found


def _passed_on(node: cst.CSTNode, up: cst.CSTNode | None, names: Names) -> str:
    target = up.targets[0].target if isinstance(up, cst.Assign) and len(up.targets) == 1 else None
    symbol = names.symbol(target)
    if symbol is not None and len(names.values[symbol]) > 1:
        return f"`{symbol[1]}` is set more than once: which autocast it is, is not known"
    return f"`{text(node)}` is passed on, not called"


def _follow(cast: Cast, found: Casts, names: Names) -> None:
    value, flags, _ = choose(cast.call, names)
    cast.enabled += flags
    lifted = None if cast.called else makers.through_lambda(value, names)
    if lifted is not None:
        value, cast.called = lifted[0], True
        cast.enabled += lifted[1]
    up = names.parent(value)
    if isinstance(up, (cst.WithItem, cst.Decorator)) and not cast.called:
        found.regions.append(_region(cast, up, names))
        return
    given = None if cast.called else makers.giver(up, names)
    if given is not None:
        cast.enabled += given[1]
        _follow_function(cast, given[0], found, names)
        return
    symbol = names.symbol(up.targets[0].target) if isinstance(up, cst.Assign) and len(up.targets) == 1 else None
    if symbol is None or up is None:
        found.reasons.append(Reason(cast.call, "autocast is used in a way that is not known"))
        return
    others = [(node, one) for node, one in names.values[symbol] if one is not value]
    if any(not makers.is_nothing(one, names, cast.called) for _, one in others) or len(others) > 1:
        found.reasons.append(Reason(cast.call, f"`{symbol[1]}` is set to several contexts"))
        return
    if others:
        beside = set(names.above(others[0][0]))
        below: cst.CSTNode = up
        for one in names.above(up):
            if isinstance(one, cst.If):
                cast.enabled.append(Flag(one.test, negated=below is one.orelse))
            if one in beside:
                break
            below = one
    for other in makers.elsewhere(symbol, names):
        found.reasons.append(Reason(other, f"the context `{symbol[1]}` is used from outside of its class"))
    cast.statements += [up, *(node for node, _ in others)]
    for context in names.family(symbol):
        cast.contexts.append(context)
        for use in names.uses[context]:
            if not _enters(cast, use, cast.called, found, names) and not _is_passing(use, names):
                found.reasons.append(Reason(use, f"the context `{context[1]}` is used in another way than by `with`"))


def _follow_function(cast: Cast, function: cst.FunctionDef, found: Casts, names: Names) -> None:
    """A function that only gives a context goes, with each `with` that calls it."""
    symbol, uses = makers.uses_of(function, names)
    others = [] if symbol is None else makers.elsewhere(symbol, names)
    wrong: list[cst.CSTNode] = [*others]
    for use in uses:
        if not _enters(cast, use, not function.decorators, found, names):
            wrong.append(use)
    if wrong or not uses:
        words = f"`{function.name.value}` gives autocast, and is used in another way than by `with` in its own class"
        found.reasons.append(Reason(cast.call, words))
    cast.statements.append(function)


def _enters(cast: Cast, use: Expression, called: bool, found: Casts, names: Names) -> bool:
    """Take in a use of a context by `with`, if it is one."""
    up = names.parent(use)
    if called and isinstance(up, cst.Call) and up.func is use and not up.args:
        up = names.parent(up)
    elif called:
        return False
    if not isinstance(up, cst.WithItem) or up.asname is not None:
        return False
    found.regions.append(_region(cast, up, names))
    return True


def _is_passing(use: cst.CSTNode, names: Names) -> bool:
    """Whether a use of a context only sets it or hands it to a function of the file."""
    up = names.parent(use)
    if isinstance(up, cst.Arg):
        call = names.parent(up)
        return isinstance(call, cst.Call) and names.called(call) is not None
    return isinstance(up, cst.AssignTarget) or (isinstance(up, cst.Param) and up.name is use)


def _region(cast: Cast, item: cst.WithItem | cst.Decorator, names: Names) -> Region:
    holder = names.parent(item)
    function = names.function(item)
    if isinstance(item, cst.Decorator):
        assert isinstance(holder, cst.FunctionDef)
        function = holder
    assert isinstance(holder, (cst.FunctionDef, cst.With))
    region = Region(cast, item, holder.body, function)
    owner = names.class_of(function)
    if owner is not None and is_module_class(owner, names):
        region.inside = owner
    return region


def _look_around(region: Region, names: Names) -> None:
    """Find the models that a region calls, and the flags around it that choose between it and the same without."""
    region.flags = list(region.cast.enabled)
    region.models = {root for root in mentions(region.code, names) if is_module(root, names)}
    if region.inside is not None:
        return
    where: list[cst.CSTNode] = [region.item]
    calls = names.calls.get(region.function, []) if region.function is not None else []
    if len(calls) == 1:
        where.append(calls[0])
    for start in where:
        stop = names.function(start) if start is not region.item else region.function
        below: cst.CSTNode = start
        for up in names.above(start):
            if up is stop:
                break
            if isinstance(up, cst.If) and not _asks_for_none(up):
                beside = up.body if below is up.orelse else up.orelse
                if beside is not None and mentions(beside, names) & region.models and not _has_region(beside, names):
                    region.flags.append(Flag(up.test, negated=below is up.orelse))
                    region.forks.append(up)
            below = up


def _asks_for_none(node: cst.If) -> bool:
    test = node.test
    return isinstance(test, cst.Comparison) and constant(test.comparisons[0].comparator) == "None"


def _has_region(code: cst.CSTNode, names: Names) -> bool:
    return any(isinstance(node, cst.Call) and names.qualified(node.func) & AUTOCAST for node in each(code))


def outside(region: Region, models: set[Symbol], regions: list[Region], names: Names) -> Reason | None:
    """Say where else in the function of a region a model computes, with gradients and outside of every region."""
    covered = {id(node) for one in regions for node in each(one.code)}
    covered |= {id(node) for fork in region.forks for node in each(fork)}
    body = names.module if region.function is None else region.function.body
    for node in each(body):
        if not isinstance(node, cst.Call) or id(node) in covered or names.function(node) is not region.function:
            continue
        base = names.base(node.func)
        if base is None or not names.roots(base) & models or _is_asking(node, names):
            continue
        if not without_gradients(node, names):
            words = f"`{text(node.func)}` computes outside of autocast here, in float32: wrapped, it would not"
            return Reason(node, words)
    return None


def trained_elsewhere(models: set[Symbol], regions: list[Region], names: Names) -> Reason | None:
    """Say where a function without autocast trains a model: wrapped, it would train in low precision there, too."""
    covered = {id(node) for one in regions for node in each(one.code)}
    covered |= {id(node) for one in regions for fork in one.forks for node in each(fork)}
    under = {one.function for one in regions}
    models = models.difference(*(one.models for one in regions if one.inside is not None))  # it brings its autocast
    nodes: list[tuple[Function, cst.Call]] = [
        (names.function(node), node) for node in names.nodes if isinstance(node, cst.Call) and id(node) not in covered
    ]
    training = {
        function
        for function, node in nodes
        if isinstance(node.func, cst.Attribute) and node.func.attr.value == "backward" and function not in under
    }
    for function, node in nodes:
        base = names.base(node.func) if function in training else None
        if base is None or not names.roots(base) & models or _is_asking(node, names) or without_gradients(node, names):
            continue
        calls = names.calls.get(function, []) if function is not None else []
        if not calls or any(id(call) not in covered for call in calls):
            words = f"`{text(node.func)}` trains without autocast here, in float32: wrapped, it would not"
            return Reason(node, words)
    return None


def _is_asking(call: cst.Call, names: Names) -> bool:
    parts = []
    node: cst.CSTNode = call.func
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    return bool(set(parts) & NOT_FORWARD) or any("parameters" in part for part in parts)


def without_gradients(node: cst.CSTNode, names: Names) -> bool:
    """Whether a node is under `no_grad` or `inference_mode`, as a context or a decorator."""
    for up in [node, *names.above(node)]:
        items: list[cst.CSTNode] = [item.item for item in up.items] if isinstance(up, cst.With) else []
        items += [one.decorator for one in up.decorators] if isinstance(up, cst.FunctionDef) else []
        if any("no_grad" in text(item) or "inference_mode" in text(item) for item in items):
            return True
    return False


def site(region: Region, names: Names) -> cst.CSTNode:
    """The statement that a region is."""
    return statement(region.item, names)
