"""Parameters: gradient memory, and the notice that a gradient is complete."""

import copy
import pickle
import sys
import types

import numpy as np
import pytest

from ferro.errors import UsageError
from ferro_strategies import nn
from ferro_strategies.nn import Linear, Module, Parameter, ReLU, Residual, Sequential, namespace_of


class Twice(Module):
    """Apply one layer twice, so that its parameters are used twice in a pass."""

    def __init__(self, layer):
        self.layer = layer

    def vjp(self, x):
        y, first = self.layer.vjp(x)
        z, second = self.layer.vjp(y)
        return z, lambda grad: first(second(grad))


def parameter(*shape, dtype=np.float64, **options):
    return Parameter(np.arange(np.prod(shape), dtype=dtype).reshape(shape), **options)


def completions(module):
    """Record names, with a copy of the gradient, as parameters become complete."""
    record = []
    for name, each in module.named_parameters():
        each.name = name
        each.on_complete(lambda p: record.append((p.name, p.grad.copy())))
    return record


# --- gradient and memory ---


def test_additions_accumulate_until_zero_grad():
    p = parameter(2, 3)
    assert p.grad is None
    given = np.ones((2, 3))
    p.add_grad(given)
    p.add_grad(2 * given)
    np.testing.assert_array_equal(p.grad, 3 * np.ones((2, 3)))
    np.testing.assert_array_equal(given, 1)  # never kept, so never changed
    p.zero_grad()
    assert p.grad is None
    p.add_grad(given)
    np.testing.assert_array_equal(p.grad, given)


def test_products_and_rows_add_as_whole_gradients_do():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 5)), rng.standard_normal((5, 6))
    product, rows = Parameter(np.zeros((4, 3, 2))), Parameter(np.zeros((4, 2)))
    for times in (1, 2):
        product.add_grad_product(a, b)
        np.testing.assert_allclose(product.grad, times * (a @ b).reshape(4, 3, 2))
        rows.add_grad_rows(np.array([3, 1]), np.array([[1.0, 2.0], [3.0, 4.0]]))
        expected = [[0, 0], [3 * times, 4 * times], [0, 0], [times, 2 * times]]
        np.testing.assert_array_equal(rows.grad, expected)


@pytest.mark.parametrize("add", ["grad", "product", "rows"])
def test_preset_memory_is_the_gradient(add):
    p = Parameter(np.zeros((2, 3), np.float32))
    bucket = np.full(10, np.nan, np.float32)
    view = bucket[2:8].reshape(2, 3)
    p.set_grad_memory(view)
    assert p.grad is None  # absent, whatever the memory holds
    for times in (1, 2):
        if add == "grad":
            p.add_grad(np.ones((2, 3), np.float32))
        elif add == "product":
            p.add_grad_product(np.ones((2, 1), np.float32), np.ones((1, 3), np.float32))
        else:
            p.add_grad_rows(np.array([0, 1]), np.ones((2, 3), np.float32))
        assert p.grad is view
        np.testing.assert_array_equal(bucket[2:8], times)
    assert np.isnan(bucket[[0, 1, 8, 9]]).all()
    p.zero_grad()
    assert p.grad is None
    p.add_grad(np.full((2, 3), 7, np.float32))
    np.testing.assert_array_equal(bucket[2:8], 7)  # the first addition writes, it does not add


def test_setting_memory_moves_the_gradient_there_and_none_gives_it_back():
    p = parameter(2)
    p.add_grad(np.array([1.0, 2.0]))
    memory = np.zeros(2)
    p.set_grad_memory(memory)
    assert p.grad is memory
    np.testing.assert_array_equal(memory, [1, 2])
    p.set_grad_memory(None)
    p.zero_grad()
    p.add_grad(np.array([5.0, 6.0]))
    np.testing.assert_array_equal(memory, [1, 2])
    np.testing.assert_array_equal(p.grad, [5, 6])


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "memory",
    [np.zeros((3, 2)), np.zeros((2, 3), np.float32), np.zeros((3, 2)).T, read_only(np.zeros((2, 3)))],
    ids=["shape", "dtype", "order", "read-only"],
)
def test_memory_that_does_not_fit_is_refused(memory):
    p = parameter(2, 3, name="layers.0.weight")
    with pytest.raises(UsageError, match=r"layers\.0\.weight"):
        p.set_grad_memory(memory)
    p.add_grad(np.ones((2, 3)))
    assert p.grad is not memory


def test_a_gradient_can_be_scaled_in_place_and_assigned():
    p = parameter(2)
    memory = np.zeros(2)
    p.set_grad_memory(memory)
    p.grad = np.array([1.0, 2.0])
    p.grad *= 3
    assert p.grad is memory
    np.testing.assert_array_equal(memory, [3, 6])
    p.grad = None
    assert p.grad is None
    with pytest.raises(UsageError):
        p.grad = np.zeros(3)


def test_a_gradient_of_another_shape_is_refused():
    p = parameter(2, 3, name="w")
    with pytest.raises(UsageError, match=r"'w' has shape \(3,\)"):
        p.add_grad(np.zeros(3))
    with pytest.raises(UsageError, match=r"'w' has shape \(2, 2\)"):
        p.add_grad_product(np.zeros((2, 1)), np.zeros((1, 2)))
    with pytest.raises(UsageError, match=r"'w' has shape \(2, 4\)"):
        p.add_grad_rows(np.array([0]), np.zeros((1, 4)))
    assert p.grad is None


def test_without_requires_grad_nothing_is_accumulated_or_told():
    layer = Linear(2, 3, rng=0)
    layer.weight.requires_grad = layer.bias.requires_grad = False
    record = completions(layer)
    _, pullback = layer.vjp(np.ones((1, 2), np.float32))
    assert pullback(np.ones((1, 3), np.float32)).shape == (1, 2)
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert record == []


def test_gradients_take_the_dtype_of_the_parameter():
    p = parameter(2, dtype=np.float32)
    p.add_grad(np.ones(2, np.float64))
    p.add_grad(np.ones(2, np.float64))
    assert p.grad.dtype == np.float32


@pytest.mark.parametrize(
    "data", [np.zeros(3, np.int64), np.zeros((2, 3)).T, np.array(["a"])], ids=["integer", "order", "text"]
)
def test_data_must_be_contiguous_floats(data):
    with pytest.raises(UsageError, match="C-contiguous floating-point"):
        Parameter(data)
    p = parameter(2, 3)
    with pytest.raises(UsageError, match="C-contiguous floating-point"):
        p.data = data


def test_a_deep_copy_shares_nothing():
    p = parameter(2, name="w")
    p.set_grad_memory(np.zeros(2))
    told = []
    p.on_complete(told.append)
    use = p.use()
    p.add_grad(np.ones(2))
    twin = copy.deepcopy(p)
    assert (twin.name, twin.outstanding_uses) == ("w", 0)
    twin.data += 1
    twin.add_grad(np.ones(2))
    np.testing.assert_array_equal(p.data, [0, 1])
    np.testing.assert_array_equal(p.grad, [1, 1])
    np.testing.assert_array_equal(twin.grad, [2, 2])
    assert told == []
    del use


# --- completion ---


def test_completion_runs_backwards_through_a_sequential():
    model = Sequential(Linear(2, 3, rng=0), ReLU(), Linear(3, 1, rng=1))
    record = completions(model)
    _, pullback = model.vjp(np.ones((4, 2), np.float32))
    assert all(p.outstanding_uses == 1 for p in model.parameters())
    assert record == []
    pullback(np.ones((4, 1), np.float32))
    assert [name for name, _ in record] == ["layers.2.bias", "layers.2.weight", "layers.0.bias", "layers.0.weight"]
    assert all(p.outstanding_uses == 0 for p in model.parameters())


def test_tied_parameters_are_complete_after_the_last_use():
    layer = Linear(3, 3, dtype=np.float64, rng=0)
    model = Twice(Residual(Twice(layer)))
    record = completions(model)
    x = np.random.default_rng(1).standard_normal((2, 3))
    _, pullback = model.vjp(x)
    assert layer.weight.outstanding_uses == 4
    pullback(np.ones((2, 3)))
    names = ["layer.module.layer.bias", "layer.module.layer.weight"]
    assert [name for name, _ in record] == names
    for name, grad in record:
        final = dict(model.named_parameters())[name].grad
        np.testing.assert_array_equal(grad, final)  # nothing came after the notice
    nn.check_gradients(model, x)


def test_microbatches_in_flight_complete_with_the_last_pullback():
    layer = Linear(2, 2, rng=0)
    record = completions(layer)
    x = np.ones((1, 2), np.float32)
    pullbacks = [layer.vjp(x)[1] for _ in range(3)]
    for pullback in pullbacks[:-1]:
        pullback(x)
    assert record == []
    pullbacks[-1](x)
    assert [name for name, _ in record] == ["bias", "weight"]
    np.testing.assert_array_equal(layer.bias.grad, [3, 3])


def test_dropped_pullbacks_and_plain_calls_leave_no_use_behind():
    model = Sequential(Linear(2, 2, rng=0), Residual(Linear(2, 2, rng=1)))
    record = completions(model)
    x = np.ones((1, 2), np.float32)
    model(x)
    _, abandoned = model.vjp(x)
    _, pullback = model.vjp(x)
    del abandoned
    assert all(p.outstanding_uses == 1 for p in model.parameters())
    pullback(x)
    assert len(record) == 4


def test_a_pullback_kept_but_never_run_holds_completion_back():
    layer = Linear(2, 2, rng=0)
    record = completions(layer)
    x = np.ones((1, 2), np.float32)
    _, kept = layer.vjp(x)
    layer.vjp(x)[1](x)
    assert record == []
    assert layer.weight.outstanding_uses == 1
    del kept
    assert layer.weight.outstanding_uses == 0


def test_zero_grad_between_the_halves_forgets_no_use():
    layer = Linear(2, 2, rng=0)
    model = Twice(layer)
    record = completions(model)
    x = np.ones((1, 2), np.float32)
    _, pullback = model.vjp(x)
    model.zero_grad()
    pullback(x)
    assert [name for name, _ in record] == ["layer.bias", "layer.weight"]


def test_an_unused_parameter_shows_right_after_the_forward_half():
    used, unused = Linear(2, 2, rng=0), Linear(2, 2, rng=0)
    _, pullback = used.vjp(np.ones((1, 2), np.float32))
    assert used.weight.outstanding_uses == 1
    assert unused.weight.outstanding_uses == 0
    del pullback


def test_a_use_is_good_for_one_gradient():
    layer = Linear(2, 2, rng=0)
    x = np.ones((1, 2), np.float32)
    _, pullback = layer.vjp(x)
    pullback(x)
    before = layer.bias.grad.copy()
    with pytest.raises(UsageError, match="only once"):
        pullback(x)
    np.testing.assert_array_equal(layer.bias.grad, before)


def test_additions_outside_any_use_complete_at_once_but_not_while_one_is_outstanding():
    p = parameter(2)
    told = []
    p.on_complete(told.append)
    p.add_grad(np.ones(2))
    assert told == [p]
    use = p.use()
    p.add_grad(np.ones(2))
    assert told == [p]
    use.add_grad(np.ones(2))
    assert told == [p, p]


def test_listeners_are_told_in_order_until_removed():
    p = parameter(2)
    told = []
    remove = p.on_complete(lambda _: told.append("first"))
    p.on_complete(lambda _: told.append("second"))
    p.add_grad(np.ones(2))
    assert told == ["first", "second"]
    remove()
    p.add_grad(np.ones(2))
    assert told == ["first", "second", "second"]


# --- namespaces ---


def test_the_namespace_is_that_of_the_array(monkeypatch):
    assert namespace_of(np.zeros(1)) is np
    cupy = types.ModuleType("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    array = type("ndarray", (), {"__module__": "cupy"})()
    assert namespace_of(array) is cupy
    with pytest.raises(UsageError, match=r"builtins\.list"):
        namespace_of([1.0])


# --- pieces ---


def test_a_parameter_can_hold_its_piece_and_the_whole_in_turn():
    whole, piece = np.arange(6.0).reshape(2, 3), np.arange(2.0)
    shard_grad = np.zeros(2)
    kept = Parameter(whole)
    listener = []
    kept.on_complete(lambda each: listener.append(each.data.shape))
    use = kept.use()
    kept.hold(piece, grad=shard_grad, grad_memory=shard_grad)
    assert kept.data is piece
    assert kept.grad is shard_grad
    assert kept.outstanding_uses == 1
    kept.grad += 1
    np.testing.assert_array_equal(shard_grad, 1)
    memory = np.full((2, 3), np.nan)
    kept.hold(whole, grad=None, grad_memory=memory)
    assert kept.grad is None
    use.add_grad(np.ones((2, 3)))
    assert kept.grad is memory
    np.testing.assert_array_equal(memory, 1)
    assert listener == [(2, 3)]


def test_memory_of_another_shape_than_the_value_is_refused():
    with pytest.raises(UsageError, match="has shape"):
        parameter(3).hold(np.zeros(2), grad=None, grad_memory=np.zeros(3))


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda use: use.add_grad(np.ones((3, 2))), r"shape \(3, 2\), but the parameter has \(2, 3\)"),
        (lambda use: use.add_grad(np.ones(3)), r"shape \(3,\), but"),
        (lambda use: use.add_grad([[1.0] * 3] * 2), "got builtins.list"),
        (lambda use: use.add_grad(np.ones((2, 3), complex)), "imaginary part would be lost"),
        (lambda use: use.add_grad_product(np.ones((3, 4)), np.ones((4, 2))), r"shape \(3, 2\), but"),
        (lambda use: use.add_grad_product(np.ones((2, 4)), np.ones((3, 4))), r"shape \(2, 4\), but"),
        (lambda use: use.add_grad_rows(np.array([0]), np.ones((1, 2))), r"shape \(2, 2\), but"),
        (lambda use: use.add_grad_rows(np.array([0]), np.ones((2, 3))), r"2 rows of .* indices of shape \(1,\)"),
    ],
)
def test_a_refused_gradient_leaves_its_use_to_be_tried_again(add, message):
    parameter = Parameter(np.zeros((2, 3)))
    use = parameter.use()
    with pytest.raises(UsageError, match=message):
        add(use)
    assert parameter.outstanding_uses == 1
    assert parameter.grad is None
    use.add_grad_product(np.ones((2, 1)), np.ones((1, 3)))
    assert parameter.outstanding_uses == 0
    np.testing.assert_array_equal(parameter.grad, np.ones((2, 3)))


def test_a_product_may_merge_the_dimensions_after_the_first():
    parameter = Parameter(np.zeros((2, 3, 4)))
    parameter.add_grad_product(np.ones((2, 5)), np.ones((5, 12)))
    np.testing.assert_array_equal(parameter.grad, np.full((2, 3, 4), 5.0))


def test_a_pickled_parameter_has_its_value_and_gradient_and_is_tied_as_before():
    parameter = Parameter(np.arange(3.0), name="w", requires_grad=True)
    parameter.add_grad(np.ones(3))
    use = parameter.use()
    one, two = pickle.loads(pickle.dumps([parameter, parameter]))
    assert one is two
    assert use.requires_grad
    assert (one.name, one.outstanding_uses) == ("w", 0)
    np.testing.assert_array_equal(one.data, parameter.data)
    np.testing.assert_array_equal(one.grad, parameter.grad)
    one.add_grad(np.ones(3))
    np.testing.assert_array_equal(parameter.grad, np.ones(3))


def test_a_scalar_of_numpy_is_a_parameter_of_no_dimensions():
    scale = Parameter(np.float32(2))
    assert scale.shape == ()
    scale.add_grad(np.float32(3))
    assert scale.grad == 3
    with pytest.raises(UsageError, match=r"got builtins\.float"):
        Parameter(2.0)
