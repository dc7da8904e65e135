"""The layout of flat parameters, the buffer pool, and the choice of units: no ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferro
from ferro_strategies.fsdp.buffer_pool import BufferPool
from ferro_strategies.fsdp.layout import flat_layout
from ferro_strategies.fsdp.unit_policy import choose_units, owners
from ferro_strategies.nn import Linear, Module, Parameter, ReLU, Residual, Sequential

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)


@given(SHAPES, st.integers(1, 9))
def test_every_element_is_in_exactly_one_shard(shapes, ranks):
    layout = flat_layout(((str(index), shape) for index, shape in enumerate(shapes)), ranks)
    assert layout.unpadded_size <= layout.size < layout.unpadded_size + ranks
    flat = np.arange(layout.size)
    for span in layout.spans:
        parameter = flat[span.start : span.stop]
        assert parameter.size == np.prod(span.shape, dtype=int)
        shards = [flat[layout.shard_slice(rank)][layout.slice_in_shard(span, rank)] for rank in range(ranks)]
        np.testing.assert_array_equal(np.concatenate(shards), parameter)
        for rank, own_shard in enumerate(shards):
            np.testing.assert_array_equal(parameter[layout.slice_in_parameter(span, rank)], own_shard)
        assert [own_shard.size for own_shard in shards] == layout.shard_sizes(span)


def test_the_picture_of_the_layout():
    layout = flat_layout((("a", (3,)), ("b", (2, 2)), ("c", (3,))), 4)
    row = "".join(span.name * (span.stop - span.start) for span in layout.spans)
    assert row + "." * (layout.size - layout.unpadded_size) == "aaabbbbccc.."
    assert [layout.shard_slice(rank).start for rank in range(4)] == [0, 3, 6, 9]
    assert layout.shard_sizes(layout.spans[1]) == [0, 3, 1, 0]


def test_the_pool_lends_one_memory_again_and_again():
    pool = BufferPool(ferro.simulate(lambda group: group, 1)[0])
    double = np.dtype(np.float64)
    first = pool.allocate(np, 100, double)
    second = pool.allocate(np, 10, double)
    assert not np.may_share_memory(first.array, second.array)
    address = first.array.ctypes.data
    del first
    third = pool.allocate(np, 50, double)
    assert third.array.ctypes.data == address
    assert third.array.size == 50
    third.abandon()
    del third, second
    small = pool.allocate(np, 1, double)
    large = pool.allocate(np, 1000, double)
    assert address not in (small.array.ctypes.data, large.array.ctypes.data)
    assert large.array.size == 1000


class Held(Module):
    """Holds one parameter, and further attributes as given."""

    def __init__(self, **parts):
        self.own = Parameter(np.ones(1))
        vars(self).update(parts)

    def vjp(self, x):
        return x, lambda grad: grad


def names_of(root, units=None):
    chosen = choose_units(root, units)
    return [name for name, module in root.named_modules() if id(module) in chosen]


def line():
    return Linear(1, 1, rng=0)


def test_elements_of_lists_are_units():
    assert names_of(Sequential(line(), ReLU(), line())) == ["layers.0", "layers.2"]
    assert names_of(Sequential(Sequential(line(), line()), line())) == [
        "layers.0.layers.0",
        "layers.0.layers.1",
        "layers.1",
    ]
    assert names_of(Sequential(Residual(Sequential(line(), line())), line())) == ["layers.0", "layers.1"]
    root = Held(head=line(), body=Held(blocks=(Held(), {"x": Held()})))
    assert names_of(root) == ["body.blocks.0", "body.blocks.1.x"]
    # An element with lists and more of its own is one unit.
    assert names_of(Sequential(Held(experts=[line(), line()]))) == ["layers.0"]


def test_units_by_policy_and_by_hand():
    root = Sequential(Residual(Sequential(line(), line())), line())
    assert names_of(root, lambda name, _: name.endswith("module")) == ["layers.0.module"]
    linears = ["layers.0.module.layers.0", "layers.0.module.layers.1", "layers.1"]
    assert names_of(root, lambda _, module: isinstance(module, Linear)) == linears
    assert names_of(root, [root.layers[1]]) == ["layers.1"]
    assert names_of(root, lambda *_: True).count("") == 0
    with pytest.raises(ferro.UsageError, match="not below the module"):
        choose_units(root, [line()])


def test_a_parameter_belongs_to_the_innermost_unit_or_if_shared_to_the_root():
    inner, outer, other = Held(), Held(), Held()
    outer.inner = inner
    other.tied, inner.tied = inner.own, Parameter(np.ones(1))
    root = Sequential(outer, other)
    units = choose_units(root, [outer, inner, other])
    owner = owners(root, units)
    assert owner == {
        id(outer.own): id(outer),
        id(inner.own): id(root),
        id(inner.tied): id(inner),
        id(other.own): id(other),
    }


def test_a_module_in_two_spans_is_one_unit():
    shared = line()
    root = Sequential(shared, Residual(shared))
    chosen = choose_units(root, [shared])
    assert set(owners(root, chosen).values()) == {id(shared)}
    assert set(owners(root, choose_units(root, [])).values()) == {id(root)}
