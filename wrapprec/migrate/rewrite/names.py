"""What the names of a file stand for: variables, attributes of `self`, and the parameters that they are passed to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TypeAlias

from wrapprec.migrate.rewrite.lineage import Lineage
from wrapprec.migrate.rewrite.syntax import cst, each, meta, text
from wrapprec.migrate.rewrite.targets import assigned, is_set, is_static, moved

Function: TypeAlias = "cst.FunctionDef | None"
"""A function; None: the file's own level."""
Symbol: TypeAlias = "tuple[object, str]"
"""A name and where it lives: a scope of libcst, or the class whose `self` has the attribute."""
Expression: TypeAlias = "cst.BaseExpression"


class Names:
    """Finds out what names stand for, in one file, the `module`."""

    def __init__(self, module: cst.Module) -> None:
        wrapper = meta.MetadataWrapper(module, unsafe_skip_copy=True)  # a tree just parsed has every node once
        self.module = wrapper.module
        self._scopes = wrapper.resolve(meta.ScopeProvider)
        self._positions = wrapper.resolve(meta.PositionProvider)
        # libcst's providers of parents and qualified names each walk the whole tree once more: half of the time
        self._qualified: dict[cst.CSTNode, set[str]] = {}
        self._parents: dict[cst.CSTNode, cst.CSTNode] = {}
        self.nodes = self._below(self.module)
        self.uses: dict[Symbol, list[Expression]] = defaultdict(list)
        self.values: dict[Symbol, list[tuple[cst.CSTNode, Expression]]] = defaultdict(list)
        self.functions: dict[Symbol, cst.FunctionDef] = {}
        self.classes: dict[Symbol, cst.ClassDef] = {}
        self.params: dict[Symbol, cst.FunctionDef] = {}
        self.sites: dict[Symbol, list[Expression]] = defaultdict(list)
        self.calls: dict[cst.FunctionDef, list[cst.Call]] = defaultdict(list)
        self.moving: set[Symbol] = set()
        """What loops, `with ... as` and `+=` set, and `except ... as`: of no one value."""
        self._roots: dict[Symbol, frozenset[Symbol]] = {}
        self.lineage = Lineage()
        self._relate()
        self._collect()

    def _below(self, module: cst.Module) -> list[cst.CSTNode]:
        """All nodes in the order of the text; notes what stands above each."""
        found: list[cst.CSTNode] = []
        todo: list[cst.CSTNode] = [module]
        while todo:
            node = todo.pop()
            found.append(node)
            children = node.children
            for child in children:
                self._parents[child] = node
            todo += reversed(children)
        return found

    def _relate(self) -> None:
        """Learn which class is above which, before names are looked up: attributes may belong to another class."""
        for node in self.nodes:
            if isinstance(node, cst.ClassDef):
                self.classes[(self._scopes.get(node), node.name.value)] = node
        selves = [(node, self._self_class(node.value)) for node in self.nodes if is_set(node, self.parent(node))]  # type: ignore[attr-defined]
        defined = [(node, self.class_of(node)) for node in self.nodes if isinstance(node, cst.FunctionDef)]
        self.lineage.read(
            self.classes.values(),
            lambda base: self.classes.get(self.symbol(base)) if isinstance(base, cst.Name) else None,  # type: ignore[arg-type]
            [(owner, node.attr.value) for node, owner in selves if owner is not None],  # type: ignore[attr-defined]
            [(owner, node.name.value) for node, owner in defined if owner is not None],
        )

    def _collect(self) -> None:
        for node in self.nodes:
            if isinstance(node, (cst.Name, cst.Attribute)):
                symbol = self.symbol(node)
                if symbol is not None:
                    self.uses[symbol].append(node)
            if isinstance(node, cst.FunctionDef):
                owner = self.class_of(node)
                scope = self._scopes.get(node)
                self.functions[(owner or scope, node.name.value)] = node
                for param in self.parameters(node):
                    symbol = self.symbol(param.name)
                    if symbol is not None:
                        self.params[symbol] = node
            for one in moved(node):
                symbol = self.symbol(one)
                if symbol is not None:
                    self.moving.add(symbol)
            for target, value in assigned(node):
                symbol = self.symbol(target)
                if symbol is not None:
                    self.values[symbol].append((node, value))
        for node in self.nodes:
            called = self.called(node) if isinstance(node, cst.Call) else None
            if isinstance(node, cst.Call) and called is not None:
                self.calls[called].append(node)
                for name, argument in self.bind(node, called).items():
                    symbol = self.symbol(self.parameter(called, name))
                    if symbol is not None:
                        self.sites[symbol].append(argument.value)

    # Where a node stands

    def line(self, node: cst.CSTNode) -> int:
        """The number of the line where a node begins."""
        return int(self._positions[node].start.line)

    def last(self, node: cst.CSTNode) -> int:
        """The number of the line where the last statement in a node begins."""
        kinds = (cst.BaseSmallStatement, cst.BaseCompoundStatement)
        return max((self.line(one) for one in each(node) if isinstance(one, kinds)), default=self.line(node))

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        """The node above."""
        return self._parents.get(node)

    def above(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """The nodes above, from the next one on."""
        parent = self._parents.get(node)
        while parent is not None:
            yield parent
            parent = self._parents.get(parent)

    def function(self, node: cst.CSTNode) -> Function:
        """The function that a node is in; lambdas belong to what is around them. A decorator is its function's."""
        return next((up for up in self.above(node) if isinstance(up, cst.FunctionDef)), None)

    def class_of(self, function: Function) -> cst.ClassDef | None:
        """The class whose method a function is."""
        if function is None:
            return None
        up = next((up for up in self.above(function) if isinstance(up, (cst.FunctionDef, cst.ClassDef))), None)
        return up if isinstance(up, cst.ClassDef) else None

    def qualified(self, node: cst.CSTNode) -> set[str]:
        """What an expression is called where it comes from: `{"torch.amp.autocast"}`."""
        if node not in self._qualified:
            scope = self._scopes.get(node)
            found = () if scope is None else scope.get_qualified_names_for(node)
            self._qualified[node] = {one.name for one in found if one.source is not meta.QualifiedNameSource.BUILTIN}
        given = self._qualified[node]
        return given if not isinstance(node, cst.Name) else self._aliased(node) or given

    def _aliased(self, node: cst.Name) -> set[str]:
        """What autocast or GradScaler a name was set to, once: `autocast = torch.cuda.amp.autocast`."""
        symbol = self.symbol(node)
        values = self.values.get(symbol, []) if symbol is not None else []
        if len(values) != 1 or symbol in self.moving or symbol in self.params or self.in_class(symbol):
            return set()
        value = values[0][1]
        same = isinstance(value, (cst.Name, cst.Attribute)) and not isinstance(self.parent(node), cst.AssignTarget)
        is_cycle = isinstance(value, cst.Name) and self.symbol(value) == symbol
        found = self.qualified(value) if same and not is_cycle else set()
        return {one for one in found if one.startswith("torch.") and one.endswith((".autocast", ".GradScaler"))}

    def aliases(self, node: cst.CSTNode | None, value: cst.CSTNode) -> bool:
        """Whether a statement only gives a value another name, and the only one to set that name."""
        target = node.targets[0].target if isinstance(node, cst.Assign) and len(node.targets) == 1 else None
        symbol = self.symbol(target) if isinstance(target, cst.Name) else None
        once = symbol is not None and len(self.values[symbol]) == 1 and symbol not in self.moving
        return once and not self.in_class(symbol) and isinstance(node, cst.Assign) and node.value is value

    def in_class(self, symbol: Symbol | None) -> bool:
        """Whether a name is set in the body of a class, where all objects share it."""
        return symbol is not None and isinstance(symbol[0], meta.ClassScope)

    # Names

    def symbol(self, node: cst.CSTNode | None) -> Symbol | None:
        """What a name, or an attribute of `self`, stands for; None for anything else."""
        if isinstance(node, cst.Name):
            scope = self._scopes.get(node)
            if scope is None:
                return None
            homes = {one.scope for one in scope[node.value]}
            return (homes.pop(), node.value) if len(homes) == 1 else None
        if isinstance(node, cst.Attribute) and isinstance(node.value, cst.Name):
            owner = self._self_class(node.value)
            return None if owner is None else (self.lineage.owner(owner, node.attr.value), node.attr.value)
        return None

    def _self_class(self, name: cst.Name) -> cst.ClassDef | None:
        function: Function = self.function(name)
        while function is not None:
            owner = self.class_of(function)
            if owner is not None:
                first = next(iter(self.parameters(function)), None)
                return owner if first is not None and first.name.value == name.value else None
            function = self.function(function)
        return None

    def base(self, node: cst.CSTNode) -> Symbol | None:
        """The symbol that an expression is a part of: `model.head` and `model.module` are parts of `model`."""
        while True:
            symbol = self.symbol(node)
            if symbol is not None or not isinstance(node, (cst.Attribute, cst.Subscript)):
                return symbol
            node = node.value

    def parameters(self, function: cst.FunctionDef) -> list[cst.Param]:
        """The parameters of a function by position or name, without stars."""
        params = function.params
        return [*params.posonly_params, *params.params, *params.kwonly_params]

    def parameter(self, function: cst.FunctionDef, name: str) -> cst.Name:
        """The name node of a parameter."""
        return next(param.name for param in self.parameters(function) if param.name.value == name)

    def elsewhere(self, symbol: Symbol) -> list[cst.Attribute]:
        """Where an attribute of `self` may be used from outside of its class: by another name, or in a class below."""
        if not isinstance(symbol[0], cst.ClassDef):
            return []
        same = [node for node in self.nodes if isinstance(node, cst.Attribute) and node.attr.value == symbol[1]]
        others = [(node, self.symbol(node)) for node in same]
        return [node for node, one in others if one != symbol and (one is None or one not in self.values)]

    # Calls

    def called(self, call: cst.Call) -> cst.FunctionDef | None:
        """The function of this file that a call runs; a class's `__init__`."""
        symbol = self.symbol(call.func)
        if symbol is None:
            return self._super(call)
        if symbol in self.classes:
            return self.functions.get((self.lineage.owner(self.classes[symbol], "__init__"), "__init__"))
        return self.functions.get(symbol)

    def _super(self, call: cst.Call) -> cst.FunctionDef | None:
        """The method of a class above that `super().method()` runs."""
        func = call.func
        if not isinstance(func, cst.Attribute) or not isinstance(func.value, cst.Call):
            return None
        owner = self.class_of(self.function(call)) if getattr(func.value.func, "value", "") == "super" else None
        above = self.lineage.above(owner)[1:] if owner is not None else []
        found = [self.functions.get((one, func.attr.value)) for one in above]
        return next((one for one in found if one is not None), None)

    def bind(self, call: cst.Call, function: cst.FunctionDef) -> dict[str, cst.Arg]:
        """The arguments of a call by the parameter they go to; those behind a star are left out."""
        by_position = [*function.params.posonly_params, *function.params.params]
        if self.class_of(function) is not None and not any(is_static(one) for one in function.decorators):
            by_position = by_position[1:]
        known = {param.name.value for param in self.parameters(function)}
        bound: dict[str, cst.Arg] = {}
        starred = False
        for number, argument in enumerate(call.args):
            starred = starred or argument.star == "*"
            if argument.keyword is not None:
                if argument.keyword.value in known:
                    bound[argument.keyword.value] = argument
            elif not starred and not argument.star and number < len(by_position):
                bound[by_position[number].name.value] = argument
        return bound

    # The same thing under several names

    def roots(self, symbol: Symbol) -> frozenset[Symbol]:
        """Where the value of a symbol was made: through parameters, plain aliases and `.module`."""
        if symbol not in self._roots:
            self._roots[symbol] = frozenset([symbol])  # what a cycle sees
            found: set[Symbol] = set()
            sources = self.sites.get(symbol, []) if symbol in self.params else []
            values = [value for _, value in self.values.get(symbol, [])]
            if symbol in self.params and not values:
                given = [source for source in sources if text(source) != "None"]
                found = {root for source in given for root in self._sources(source)}
                if not given or any(not self._sources(source) for source in given):
                    found = set()
            elif len(values) == 1 and symbol not in self.params:
                found = set(self._sources(values[0]))
            elif len(values) > 1 and symbol not in self.params and symbol not in self.moving:
                first = [value for value in values if not self._goes_on(value, symbol)]
                found = set(self._sources(first[0])) if len(first) == 1 else set()
            self._roots[symbol] = frozenset(found) or frozenset([symbol])
        return self._roots[symbol]

    def _goes_on(self, value: Expression, symbol: Symbol) -> bool:
        """Whether a value is made of what the symbol held before: `model = DataParallel(model)`."""
        if not isinstance(value, cst.Call):
            return False
        parts = [arg.value for arg in value.args[:1]]
        parts += [value.func.value] if isinstance(value.func, cst.Attribute) else []
        return any(self.symbol(part) == symbol for part in parts)

    def _sources(self, value: Expression) -> frozenset[Symbol]:
        if isinstance(value, cst.IfExp):
            one, other = self._sources(value.body), self._sources(value.orelse)
            return one if one == other else frozenset()
        if isinstance(value, cst.Attribute) and value.attr.value == "module":
            value = value.value
        symbol = self.symbol(value)
        return frozenset() if symbol is None else self.roots(symbol)

    def family(self, root: Symbol) -> list[Symbol]:
        """Every symbol whose value was made as this root."""
        return [symbol for symbol in self.uses if root in self.roots(symbol)]
