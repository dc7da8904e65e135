"""WholeGrad: the gradients of a flat array, whole, from the first addition until they are sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..nn.arrays import Array
from ..nn.parameter import Parameter
from .layout import Layout
from .memory import Loan


class WholeGrad:
    """What this rank alone has added, of parameters one after the other.

    Args:
        members: the parameters.
        layout: where they lie.
        lend: returns memory for all of them.
        stays: whether the memory is kept when its content has been taken.
    """

    def __init__(
        self,
        members: Sequence[Parameter],
        layout: Layout,
        lend: Callable[[], Loan],
        *,
        stays: bool,
    ) -> None:
        self._members = members
        self._layout = layout
        self._lend = lend
        self._stays = stays
        self._loan: Loan | None = None
        self._added = [False] * len(members)

    @property
    def has_added(self) -> bool:
        """Whether there is something to be reduced."""
        return any(self._added)

    def places(self) -> list[tuple[Array, Array | None]]:
        """Return for each parameter where its gradient goes, and what there is of it already."""
        if self._loan is None:
            self._loan = self._lend()
        memory = self._layout.cut(self._loan.array)
        return [
            (place, place if added else None)
            for place, added in zip(memory, self._added, strict=True)
        ]

    def note(self, index: int) -> None:
        """Remember whether a parameter that holds its place now has a gradient there."""
        self._added[index] |= self._members[index].grad is not None

    def put_off(self, index: int, products: Sequence[Callable[[], None]]) -> list[partial[None]]:
        """Return what is to be called, outside passes, to add products that were deferred."""
        return [partial(self._add, index, product) for product in products]

    def take(self) -> Loan:
        """Return all gradients, with zeros where none is, and begin anew."""
        if self._loan is None:
            self._loan = self._lend()
        taken = self._loan
        taken.array[self._layout.used :] = 0
        for place, added in zip(self._layout.places, self._added, strict=True):
            if not added:
                taken.array[place.start : place.stop] = 0
        self._added = [False] * len(self._members)
        if not self._stays:
            self._loan = None
        return taken

    def keeps(self, taken: Loan) -> bool:
        """Say whether gradients that were taken lie where others are going to be added."""
        return taken is self._loan

    def drop(self) -> None:
        """Forget what was added."""
        self._loan = None
        self._added = [False] * len(self._members)

    def _add(self, index: int, product: Callable[[], None]) -> None:
        parameter = self._members[index]
        piece, reduced = parameter.data, parameter.grad
        place, added = self.places()[index]
        # Of the value a product asks nothing but size and type, which its gradient has as well.
        parameter.hold(place, grad=added, grad_memory=place)
        try:
            product()
            self.note(index)
        finally:
            parameter.hold(piece, grad=reduced, grad_memory=reduced)
