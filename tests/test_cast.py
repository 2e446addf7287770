"""Which tensors are cast, and that everything else keeps its type and identity."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from wrapprec.cast import cast_tree, map_tensors, mend, tensors_in

BF16 = torch.bfloat16
Pair = namedtuple("Pair", "left right")


class Typed(NamedTuple):
    x: Tensor
    label: str


@dataclasses.dataclass
class Plain:
    x: Tensor
    label: str = "plain"
    made: int = 0

    def __post_init__(self) -> None:
        self.made += 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    label: str = "frozen"

    def __post_init__(self) -> None:
        if isinstance(self.x, Tensor) and self.x.dtype == BF16:
            raise AssertionError("__post_init__ ran again")


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor


class Opaque:
    def __init__(self, x: Any) -> None:
        self.x = x


class OpaqueSlots:
    __slots__ = ("__hidden", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.__hidden = x * 2

    def hidden(self) -> Tensor:
        return self.__hidden


def ones() -> Tensor:
    return torch.ones(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_mixable_tensor_is_cast(dtype: torch.dtype) -> None:
    assert cast_tree(torch.ones(2, dtype=dtype), BF16).dtype == BF16


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_other_dtypes_are_the_same_object(dtype: torch.dtype) -> None:
    tensor = torch.ones(2).to(dtype)
    assert cast_tree(tensor, BF16) is tensor


def test_tensor_in_the_wanted_dtype_is_the_same_object() -> None:
    tree = (torch.ones(2, dtype=BF16), {"n": 1, "deep": [torch.ones(1, dtype=BF16)]})
    assert cast_tree(tree, BF16) is tree


def test_unchanged_branch_is_the_same_object() -> None:
    kept = [torch.arange(2), "text", Opaque(ones())]
    result = cast_tree((ones(), kept), BF16)
    assert result[1] is kept


@pytest.mark.parametrize(
    "tree",
    [
        (1, ones()),
        [ones()],
        {"x": ones()},
        OrderedDict(x=ones()),
        deque([ones()], maxlen=3),
        UserDict(x=ones()),
        Pair(ones(), 2),
        Typed(ones(), "label"),
        Plain(ones()),
        Frozen(ones()),
        Slotted(ones()),
        torch.max(torch.ones(2, 2), 1),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_container_keeps_its_type_and_its_original(tree: Any) -> None:
    result = cast_tree(tree, BF16)
    assert type(result) is type(tree)
    assert result is not tree
    assert [t.dtype for t in tensors_in(result) if t.is_floating_point()] == [BF16]
    assert [t.dtype for t in tensors_in(tree) if t.is_floating_point()] == [torch.float32]


def test_defaultdict_keeps_its_factory() -> None:
    tree = defaultdict(list, x=ones())  # type: ignore[arg-type]  # a tensor among lists
    result = cast_tree(tree, BF16)
    assert result["new"] == []
    assert result["x"].dtype == BF16


def test_deque_keeps_its_bound() -> None:
    assert cast_tree(deque([ones()], maxlen=3), BF16).maxlen == 3


def test_dataclass_is_copied_without_running_post_init_again() -> None:
    result = cast_tree(Plain(ones()), BF16)
    assert (result.made, result.label, result.x.dtype) == (1, "plain", BF16)
    assert cast_tree(Frozen(ones()), BF16).x.dtype == BF16


def test_packed_sequence_keeps_batch_sizes_and_order() -> None:
    packed = pack_sequence([torch.randn(1, 3), torch.randn(2, 3)], enforce_sorted=False)
    result = cast_tree([packed], BF16)[0]
    assert type(result) is PackedSequence
    assert result.data.dtype == BF16
    assert result.batch_sizes is packed.batch_sizes
    assert result.sorted_indices is packed.sorted_indices


def test_model_output_keeps_type_keys_and_attributes_in_step() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutput(last_hidden_state=ones(), hidden_states=(ones(), ones()))
    result = cast_tree(output, BF16)
    assert type(result) is outputs.BaseModelOutput
    assert list(result.keys()) == ["last_hidden_state", "hidden_states"]
    assert result["last_hidden_state"] is result.last_hidden_state is result[0]
    assert result.hidden_states is result["hidden_states"]
    assert result.hidden_states[1].dtype == BF16
    assert output.last_hidden_state.dtype == torch.float32


def test_tensor_that_occurs_twice_is_cast_once() -> None:
    x = ones()
    calls: list[tuple[Tensor, Tensor]] = []
    for tree in ((x, x), [x, {"again": x}], Plain(x), Pair(x, [x])):
        calls.clear()
        result = cast_tree(tree, BF16, on_cast=lambda before, after: calls.append((before, after)))
        assert len(calls) == 1
        assert calls[0][0] is x
        assert all(t is calls[0][1] for t in tensors_in(result))


def test_tensor_seen_before_an_uncommon_container_is_still_cast_once() -> None:
    calls: list[Tensor] = []
    cast_tree((ones(), {"deep": Plain(ones())}), BF16, on_cast=lambda before, after: calls.append(after))
    assert len(calls) == 2


def test_parameter_gives_a_plain_tensor_with_gradient() -> None:
    parameter = nn.Parameter(ones())
    (result,) = cast_tree((parameter,), BF16)
    assert type(result) is Tensor
    (gradient,) = torch.autograd.grad(result.sum(), [parameter])
    assert gradient.dtype == torch.float32


def test_list_that_contains_itself_is_cast_into_one_that_does() -> None:
    tree: list[Any] = [ones()]
    tree.append(tree)
    result = cast_tree(tree, BF16)
    assert result[0].dtype == BF16
    assert result[1] is result
    assert tree[1] is tree


def test_cycle_through_tuples_is_closed_again() -> None:
    box: list[Any] = [ones()]
    inner = (box,)
    outer = (inner, box)
    box.append(inner)
    result = cast_tree((outer, Opaque(1)), BF16)[0]
    assert result[1][0].dtype == BF16
    assert result[1][1] is result[0]
    assert result[0][0] is result[1]


def test_unchanged_cycle_is_the_same_object() -> None:
    tree: dict[str, Any] = {"n": torch.arange(3)}
    tree["self"] = tree
    assert cast_tree(tree, BF16) is tree


def test_very_deep_nesting_does_not_exhaust_the_stack() -> None:
    tree: Any = ones()
    for _ in range(5000):
        tree = [tree]
    result = cast_tree(tree, BF16)
    for _ in range(5000):
        (result,) = result
    assert result.dtype == BF16


def test_sparse_nested_and_meta_tensors_are_cast() -> None:
    sparse = torch.eye(2).to_sparse()
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    results = cast_tree((sparse, nested, torch.ones(2, device="meta")), BF16)
    assert [t.dtype for t in results] == [BF16] * 3
    assert results[0].layout == torch.sparse_coo
    assert results[2].is_meta


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still met
def test_quantised_tensor_is_the_same_object() -> None:
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert cast_tree((tensor,), BF16)[0] is tensor


def test_modules_strings_and_opaque_objects_are_untouched() -> None:
    tree = (nn.Linear(2, 2), "text", Opaque(ones()), Plain, None, torch.float32, range(3))
    assert cast_tree(tree, BF16) is tree


def test_function_is_called_once_for_each_distinct_tensor() -> None:
    x, seen = ones(), []

    def count(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    map_tensors(count, [x, (x, ones()), Plain(x)])
    assert len(seen) == 2


TREES = st.recursive(
    st.sampled_from(["f32", "bf16", "int", 3, None, "text"]),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), children, max_size=3),
        st.tuples(children, children).map(lambda pair: Pair(*pair)),
        children.map(Frozen),
    ),
    max_leaves=12,
)


def reference(tree: Any) -> Any:
    """What the cast means, in the plainest words; leaves are names here."""
    if tree == "f32":
        return "bf16"
    if isinstance(tree, Pair):
        return Pair(reference(tree.left), reference(tree.right))
    if isinstance(tree, Frozen):
        return Frozen(reference(tree.x))
    if isinstance(tree, (list, tuple)):
        return type(tree)(reference(item) for item in tree)
    return {key: reference(item) for key, item in tree.items()} if isinstance(tree, dict) else tree


def swap(tree: Any, leaf: Any) -> Any:
    if isinstance(tree, Pair):
        return Pair(swap(tree.left, leaf), swap(tree.right, leaf))
    if isinstance(tree, Frozen):
        copy = object.__new__(Frozen)
        object.__setattr__(copy, "x", swap(tree.x, leaf))
        object.__setattr__(copy, "label", tree.label)
        return copy
    if isinstance(tree, (list, tuple)):
        return type(tree)(swap(item, leaf) for item in tree)
    return {key: swap(item, leaf) for key, item in tree.items()} if isinstance(tree, dict) else leaf(tree)


@given(TREES)
def test_any_tree_is_cast_as_the_reference_says(names: Any) -> None:
    dtypes = {"f32": torch.float32, "bf16": BF16, "int": torch.int64}
    short = {dtype: name for name, dtype in dtypes.items()}
    tree = swap(names, lambda leaf: torch.ones(1, dtype=dtypes[leaf]) if leaf in dtypes else leaf)
    result = cast_tree(tree, BF16)
    back = swap(result, lambda leaf: short[leaf.dtype] if isinstance(leaf, Tensor) else leaf)
    assert back == reference(names)
    if reference(names) == names:
        assert result is tree


def test_tensors_are_listed_once_and_in_order() -> None:
    a, b, c = ones(), torch.arange(2), ones()
    assert [id(t) for t in tensors_in((a, {"x": b, "y": [a, c]}))] == [id(a), id(b), id(c)]


def test_deep_search_reaches_attributes_slots_and_cached_properties() -> None:
    categorical = Categorical(logits=ones())
    assert len(tensors_in(categorical, deep=True)) == 1
    assert categorical.probs is not None  # computed lazily and cached on the object
    assert len(tensors_in(categorical, deep=True)) == 2
    assert len(tensors_in(OpaqueSlots(ones()), deep=True)) == 2
    assert tensors_in(OpaqueSlots(ones())) == []


def test_deep_search_stays_out_of_modules_optimizers_and_functions() -> None:
    layer = nn.Linear(2, 2)
    closure = ones()
    tree = [layer, torch.optim.SGD(layer.parameters()), lambda: closure, Opaque(layer), Plain]
    assert tensors_in(tree, deep=True) == []


def test_deep_search_ends_at_six_objects_inside_one_another() -> None:
    def nest(levels: int) -> Any:
        tree: Any = ones()
        for _ in range(levels):
            tree = Opaque([tree])
        return tree

    assert len(tensors_in(nest(6), deep=True)) == 1
    assert tensors_in(nest(7), deep=True) == []


def test_deep_search_survives_cycles() -> None:
    thing = Opaque(ones())
    thing.me = thing  # type: ignore[attr-defined]  # made up here
    assert len(tensors_in(thing, deep=True)) == 1


def test_mend_replaces_the_attributes_of_a_distribution_in_place() -> None:
    normal = Normal(torch.zeros(2), torch.ones(2))
    outer = Independent(normal, 1)
    assert mend(lambda t: t + 1, outer) is outer
    assert outer.base_dist is normal
    assert normal.loc.tolist() == [1, 1]
    assert normal.scale.tolist() == [2, 2]


def test_mend_replaces_slots_dict_values_and_list_items_in_place() -> None:
    slots, mapping, items = OpaqueSlots(ones()), {"x": ones()}, [ones()]
    for container in (slots, mapping, items):
        assert mend(torch.neg, container) is container
    assert slots.x.tolist() == [-1, -1]
    assert slots.hidden().tolist() == [-2, -2]
    assert mapping["x"].tolist() == items[0].tolist() == [-1, -1]


def test_mend_rebuilds_tuples_and_frozen_dataclasses_where_they_stand() -> None:
    frozen = Frozen(ones())
    thing = Opaque((ones(), Pair(frozen, 1)))
    mend(torch.neg, thing)
    assert thing.x[0].tolist() == [-1, -1]
    assert thing.x[1].left.x.tolist() == [-1, -1]
    assert type(thing.x[1]) is Pair
    assert frozen.x.tolist() == [1, 1]


def test_mend_returns_the_replacement_of_a_tensor_or_tuple() -> None:
    assert mend(torch.neg, ones()).tolist() == [-1, -1]
    assert mend(torch.neg, (ones(), 1))[0].tolist() == [-1, -1]


def test_mend_with_nothing_to_do_writes_nothing() -> None:
    inner = (ones(),)
    thing = Opaque({"a": inner})
    assert mend(lambda t: t, thing) is thing
    assert thing.x["a"] is inner


def test_mend_keeps_model_output_keys_and_attributes_in_step() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutput(last_hidden_state=ones())
    assert mend(torch.neg, output) is output
    assert output["last_hidden_state"] is output.last_hidden_state
    assert output[0].tolist() == [-1, -1]


def test_mend_stays_out_of_modules() -> None:
    layer = nn.Linear(2, 2)
    weight = layer.weight
    mend(torch.neg, [layer, Opaque(layer)])
    assert layer.weight is weight


def test_mend_calls_the_function_once_for_each_distinct_tensor() -> None:
    x = ones()
    thing = Opaque([x, (x,)])
    thing.me = thing  # type: ignore[attr-defined]  # made up here
    mend(torch.neg, thing)
    assert thing.x[0] is thing.x[1][0]
    assert thing.x[0].tolist() == [-1, -1]


def test_casts_compile_without_a_graph_break() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2).to(BF16)

        def forward(self, x: Tensor, extra: dict[str, Any]) -> Any:
            (x, extra) = cast_tree((x, extra), BF16)
            assert extra["q"][0] is x
            return cast_tree({"out": self.layer(x), "n": 1}, torch.float32)

    model, x = Model(), ones()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    # Equal exactly: the same eager kernels run.
    assert torch.equal(compiled(x, {"q": [x, 3]})["out"], model(x, {"q": [x, 3]})["out"])


def test_field_that_refuses_to_be_read_is_passed_over() -> None:
    @dataclasses.dataclass
    class Refuses:
        tensor: Tensor
        layers: int = 2

        def __getattribute__(self, name: str) -> Any:
            if name == "layers":
                raise RuntimeError("differs from layer to layer")
            return super().__getattribute__(name)

    cast = cast_tree(Refuses(torch.ones(1)), torch.bfloat16)
    assert cast.tensor.dtype == torch.bfloat16
