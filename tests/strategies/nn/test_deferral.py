"""deferring: pullbacks compute the input's gradient, and queue the parameters' products."""

import gc
import weakref

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import Conv2d, Embedding, LayerNorm, Linear, Parameter, ReLU, Sequential, deferring

X = np.random.default_rng(0).standard_normal((4, 3))


def model():
    return Sequential(
        Linear(3, 5, dtype=np.float64, rng=0),
        ReLU(),
        LayerNorm(5, dtype=np.float64),
        Linear(5, 2, dtype=np.float64, rng=1),
    )


def passed(stage, x=X):
    y, pullback = stage.vjp(x)
    return pullback, np.ones_like(y)


def test_products_come_later_and_are_the_same():
    now, later = model(), model()
    pullback, grad = passed(now)
    expected = pullback(grad)
    pullback, grad = passed(later)
    with deferring(later.parameters()) as products:
        np.testing.assert_array_equal(pullback(grad), expected)
    weights = [later.layers[0].weight, later.layers[3].weight]
    assert len(products) == 2
    for parameter in later.parameters():
        assert (parameter.grad is None) == (parameter in weights)
        assert parameter.outstanding_uses == (parameter in weights)
    for product in products:
        product()
    for mine, other in zip(later.parameters(), now.parameters(), strict=True):
        np.testing.assert_array_equal(mine.grad, other.grad)
        assert mine.outstanding_uses == 0


def test_a_gradient_is_complete_when_its_product_is_added():
    layer = Linear(3, 5, dtype=np.float64)
    told = []
    layer.weight.on_complete(lambda parameter: told.append("weight"))
    layer.bias.on_complete(lambda parameter: told.append("bias"))
    pullback, grad = passed(layer)
    with deferring(layer.parameters()) as products:
        pullback(grad)
    assert told == ["bias"]
    products[0]()
    assert told == ["bias", "weight"]


def test_afterwards_products_are_added_at_once_again():
    layer = Linear(3, 5, dtype=np.float64)
    with pytest.raises(ZeroDivisionError), deferring(layer.parameters()) as products:
        raise ZeroDivisionError
    pullback, grad = passed(layer)
    pullback(grad)
    assert products == []
    assert layer.weight.grad is not None


def test_several_microbatches_may_wait():
    layer, other = (Linear(3, 5, dtype=np.float64, rng=0) for _ in range(2))
    queues = []
    for start in range(3):
        part = X[start : start + 2]
        pullback, grad = passed(layer, part)
        with deferring(layer.parameters()) as products:
            pullback(grad)
        queues.append(products)
        pullback, grad = passed(other, part)
        pullback(grad)
    assert layer.weight.outstanding_uses == 3
    for products in queues:
        products.pop()()
    np.testing.assert_array_equal(layer.weight.grad, other.weight.grad)


def test_a_product_that_is_dropped_takes_its_use_along():
    layer = Linear(3, 5, dtype=np.float64)
    pullback, grad = passed(layer)
    with deferring(layer.parameters()) as products:
        pullback(grad)
    factor = weakref.ref(grad)
    del pullback, grad
    assert factor() is not None
    products.clear()
    gc.collect()
    assert factor() is None
    assert layer.weight.outstanding_uses == 0


def test_a_product_is_good_for_once():
    layer = Linear(3, 5, dtype=np.float64)
    pullback, grad = passed(layer)
    with deferring(layer.parameters()) as products:
        pullback(grad)
    products[0]()
    with pytest.raises(ferro.UsageError, match="second gradient for one use"):
        products[0]()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Conv2d(1, 2, 3, dtype=np.float64, rng=0), X.reshape(1, 1, 3, 4)),
        (Embedding(5, 2, dtype=np.float64, rng=0), np.array([1, 4, 1])),
    ],
    ids=["Conv2d", "Embedding"],
)
def test_whatever_a_layer_queues_its_gradients_are_the_same(layer, x):
    pullback, grad = passed(layer, x)
    pullback(grad)
    expected = [item.grad.copy() for item in layer.parameters()]
    layer.zero_grad()
    pullback, grad = passed(layer, x)
    with deferring(layer.parameters()) as products:
        pullback(grad)
    for product in products:
        product()
    for item, value in zip(layer.parameters(), expected, strict=True):
        np.testing.assert_array_equal(item.grad, value)


def test_frozen_parameters_queue_nothing_that_counts():
    parameter = Parameter(np.ones((2, 2)), requires_grad=False)
    use = parameter.use()
    with deferring([parameter]) as products:
        use.add_grad_product(np.ones((2, 1)), np.ones((1, 2)))
    for product in products:
        product()
    assert parameter.grad is None
