"""Use: what a pullback holds of a parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferro.errors import UsageError

from .arrays import Array

if TYPE_CHECKING:
    from .parameter import Parameter


class Use:
    """One use of a parameter in a forward pass: its value, and where its gradient goes.

    Held by the pullback, and good for one addition.
    """

    __slots__ = ("__weakref__", "_parameter")

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = parameter

    @property
    def data(self) -> Array:
        """The parameter's value as it is now."""
        return self._parameter.data

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted; when not, a pullback need not compute one."""
        return self._parameter.requires_grad

    def add_grad(self, grad: Array) -> None:
        """Add this use's gradient: see `Parameter.add_grad`."""
        self._spend()
        self._parameter.add_grad(grad)

    def add_grad_product(self, a: Array, b: Array) -> None:
        """Add this use's gradient `a @ b`: see `Parameter.add_grad_product`.

        Where products are deferred, the addition, and so the end of the use, comes later.
        """
        deferred = self._parameter.deferred
        if deferred is None:
            self._add_product(a, b)
        else:
            deferred.append(lambda: self._add_product(a, b))

    def add_grad_rows(self, rows: Array, grads: Array) -> None:
        """Add this use's gradient, rows only: see `Parameter.add_grad_rows`."""
        self._spend()
        self._parameter.add_grad_rows(rows, grads)

    def _add_product(self, a: Array, b: Array) -> None:
        self._spend()
        self._parameter.add_grad_product(a, b)

    def _spend(self) -> None:
        uses = self._parameter._uses
        if self not in uses:
            raise UsageError(
                f"a second gradient for one use of parameter {self._parameter.name!r}: "
                "a pullback can be run only once. Call vjp again for another."
            )
        uses.discard(self)
