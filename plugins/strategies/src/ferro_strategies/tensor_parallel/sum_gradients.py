"""SumGradients: a layer of whole parameters whose gradients are one term of a sum over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from ferro import ProcessGroup

from ..nn.arrays import Array, namespace_of
from ..nn.module import Module, Pullback
from ..nn.parameter import Parameter, Use


class SumGradients(Module):
    """Run a layer on this rank's piece of the activations, and sum its parameters' gradients over the ranks.

        parallelize(model, group, {"*.head_norm": SumGradients, ...})

    This is for layers that every rank holds whole and that see activations in pieces: some positions between
    sequence-parallel layers, or some heads between a column-parallel and a row-parallel layer. The gradients are
    complete, and equal on all ranks, when the pullback returns. Names of parameters are those of the layer.

    Args:
        module: the layer; it works on each piece as it does on the whole.
        group: the ranks that have the other pieces; all run the same passes.
    """

    transparent: ClassVar[bool] = True

    def __init__(self, module: Module, group: ProcessGroup) -> None:
        self.module = module
        self.group = group
        self.training = module.training

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Run the layer's vjp on stand-ins of its parameters, which collect this rank's terms."""
        terms = [
            _Term(use=parameter.use(), stand_in=_stand_in(parameter))
            for parameter in self.module.parameters()
            if parameter.requires_grad
        ]
        by_identity = dict(zip((id(p) for p in self.module.parameters() if p.requires_grad), terms, strict=True))
        with _standing_in(self.module, by_identity):
            y, pull = self.module.vjp(x)

        def pullback(grad_y: Array) -> Array | None:
            for term in terms:
                term.stand_in.data = term.use.data
            grad_x = pull(grad_y)
            sums = [self.group.all_reduce(term.grad(), async_op=True) for term in terms]
            for term, total in zip(terms, sums, strict=True):
                term.use.add_grad(total.wait())
            return grad_x

        return y, pullback

    def __repr__(self) -> str:
        return f"SumGradients({self.module!r}, {self.group!r})"


@dataclass(frozen=True, slots=True)
class _Term:
    """One use of a parameter, and the parameter that stands in for it in one pass of the layer."""

    use: Use
    stand_in: Parameter

    def grad(self) -> Array:
        """This rank's term of the gradient; zeros where the layer did not use the parameter."""
        data, grad = self.stand_in.data, self.stand_in.grad
        return namespace_of(data).zeros_like(data) if grad is None else grad


def _stand_in(parameter: Parameter) -> Parameter:
    return Parameter(parameter.data, name=parameter.name)


@contextmanager
def _standing_in(root: Module, terms: dict[int, _Term]) -> Iterator[None]:
    """Put the stand-ins in the place of the parameters for the duration of the block."""
    places = [
        (part, key, value)
        for part in root.modules()
        for key, value in vars(part).items()
        if isinstance(value, Parameter) and id(value) in terms
    ]
    for part, key, parameter in places:
        setattr(part, key, terms[id(parameter)].stand_in)
    try:
        yield
    finally:
        for part, key, parameter in places:
            setattr(part, key, parameter)
