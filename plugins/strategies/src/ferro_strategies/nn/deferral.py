"""deferring: queue the products that backward passes add to gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .parameter import Parameter


@contextmanager
def deferring(parameters: Iterable[Parameter]) -> Iterator[list[Callable[[], None]]]:
    """Queue the products that pullbacks add to these parameters' gradients, to add them later.

    A pullback computes the gradient of its input, for which earlier layers wait, and the gradients of its parameters,
    which only the optimizer needs; most of these are matrix products. A pipeline that defers the products sends the
    input's gradient sooner, and computes the products while it would otherwise be idle (Qi et al., "Zero Bubble
    Pipeline Parallelism", 2023).

    with deferring(module.parameters()) as products:
        grad_x = pullback(grad_y)
    ...                                     # send grad_x
    for product in products: product()      # now the gradients are complete

    A queued product keeps its two factors, and its use stays outstanding. Gradients that a layer
    adds in another way than by `Use.add_grad_product` are added at once.
    """
    products: list[Callable[[], None]] = []
    held = list(parameters)
    for parameter in held:
        parameter.deferred = products
    try:
        yield products
    finally:
        for parameter in held:
            parameter.deferred = None
