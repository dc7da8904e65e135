"""Deferral: put off the part of a backward pass that only this rank's parameters wait for.

A pullback computes two things: the gradient of its input, for which the layers before it wait,
and those of its parameters, for which nobody waits before the optimizer's step. Most of the
latter are matrix products. A pipeline that puts these off sends the former sooner, and fills
with them the time in which it would wait (Qi et al., "Zero Bubble Pipeline Parallelism", 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .parameter import Parameter


@contextmanager
def deferring(parameters: Iterable[Parameter]) -> Iterator[list[Callable[[], None]]]:
    """Queue the products that pullbacks add to these parameters' gradients, instead of adding.

    with deferring(module.parameters()) as products:
        grad_x = pullback(grad_y)
    ...                                     # hand grad_x on
    for product in products: product()      # now the gradients are complete

    A product that is queued keeps its two factors, and its use outstanding. What a layer adds in
    another way than `Use.add_grad_product` is added at once.
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
