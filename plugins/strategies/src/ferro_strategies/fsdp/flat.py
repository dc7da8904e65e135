"""Flat: parameters of one unit in one array, of which every rank owns a piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ferro import Work

from ..nn.arrays import Array, namespace_of
from ..nn.parameter import Parameter, Split
from .layout import Layout, lay_out
from .memory import Loan, moved, own, put
from .plan import Plan
from .share_out import share_out
from .whole_grad import WholeGrad


class Flat:
    """Parameters of one type, all learnt or all frozen, one after the other.

    Outside a pass, `parameter.data` and `grad` are this rank's pieces: views of the shard. While
    it is open they are whole: views of memory lent for that time.

    Args:
        named: at least one parameter, with qualified names. Values are those of the plan's
            first rank afterwards; every rank calls it.
        plan: see there.

    Attributes:
        members: the parameters.
        layout: where they lie.
        trained: whether gradients are wanted.
        shard: (layout.shard_size,), what this rank owns, in the type the parameters had.
        pieces: this rank's piece of each parameter, views of the shard.
        namespace: of the whole parameters.
        whole_grad: what this rank has added to gradients, whole, until it is reduced.
        landing: whether a reduction is under way to where the shard of gradients stays.
    """

    def __init__(self, named: Sequence[tuple[str, Parameter]], plan: Plan) -> None:
        first = named[0][1]
        self.members = tuple(parameter for _, parameter in named)
        self.trained = first.requires_grad
        self.layout: Layout = lay_out(((n, p.data.shape) for n, p in named), plan.ranks)
        self.landing = False
        self._plan = plan
        self._dtype = first.data.dtype
        self.namespace = namespace_of(first.data)
        self._home = np if plan.offload else self.namespace
        # Memory for the whole that stays, if there is to be one.
        self._kept = self._take() if plan.keeps_whole else None
        self.shard: Array = self._own_part()
        share_out(self.members, self.layout, self.shard, plan)
        self.pieces = self._cut(self.shard)
        self._grad: Array | None = None
        # An all_reduce works in its memory, so after that it does not stay.
        stays = plan.keeps_whole and plan.shards is not None
        self.whole_grad = WholeGrad(self.members, self.layout, self._take, stays=stays)
        self._closed: _Closed | None = None
        for parameter, piece in zip(self.members, self.pieces, strict=True):
            parameter.hold(piece, grad=None, grad_memory=None)
            if plan.shards is not None:
                parameter.splits += (Split(group=plan.shards, dim=None),)

    @property
    def is_open(self) -> bool:
        """Whether the parameters are whole at the moment."""
        return self._closed is not None

    @property
    def reduce_dtype(self) -> np.dtype:
        """In which type gradients are reduced."""
        return self._plan.precision.reduced(self._dtype)

    # -- values ----------------------------------------------------------------------------------

    def lend(self) -> Loan:
        """Return memory for the whole, until `gather` has filled it for what is queued alone."""
        return self._take(behind=True) if self._kept is None else own(self._kept.array)

    def gather(self, whole: Array) -> tuple[Work[object], Loan] | None:
        """Start to fill `whole` with all ranks' pieces; None if it is filled.

        Returns:
            What is under way, and the memory that it sends, to be held until it has ended.
        """
        mine = whole[self.layout.shard(self._plan.rank)]
        sent = own(self.shard)
        if mine.dtype != self.shard.dtype or namespace_of(self.shard) is not self.namespace:
            # Memory that does not stay may still be in use by what is queued before.
            stays = self._kept is not None
            sent = own(mine) if stays else self._take_piece(mine.dtype)
            put(sent.array, self.shard)
        if self._plan.shards is None:
            return None
        work: Work[object] = self._plan.shards.all_gather(
            sent.array, out=whole, async_op=True, copy=False
        )
        return work, sent

    def open(self, whole: Array, *, backward: bool, defers: bool = False) -> None:
        """Let the parameters be whole.

        Args:
            whole: gathered.
            backward: whether gradients are going to be added, in memory for all of them.
            defers: whether products for them may be put off until after the pass (`deferring`).
        """
        assert self._closed is None, "a unit is open already"
        self._closed = _Closed(self.members, backward=backward and self.trained)
        places: list[tuple[Array | None, Array | None]] = [(None, None)] * len(self.members)
        if self._closed.backward:
            places = [*self.whole_grad.places()]
        for parameter, view, (memory, grad) in zip(
            self.members, self.layout.cut(whole), places, strict=True
        ):
            parameter.hold(view, grad=grad, grad_memory=memory)
            if self._closed.backward and parameter.deferred is not None:
                parameter.deferred = [] if defers else None

    def close(self) -> None:
        """Let the parameters be pieces again; what was added to whole gradients is kept."""
        closed, self._closed = self._closed, None
        assert closed is not None
        for index, parameter in enumerate(self.members):
            if closed.backward:
                self.whole_grad.note(index)
            grad, queue = closed.grads[index], closed.deferred[index]
            parameter.hold(self.pieces[index], grad=grad, grad_memory=grad)
            if closed.backward and queue is not None:
                queue += self.whole_grad.put_off(index, parameter.deferred or ())
                parameter.deferred = queue

    # -- gradients -------------------------------------------------------------------------------

    @property
    def has_grad(self) -> list[bool]:
        """Of which parameters there is a piece of a reduced gradient."""
        return [grad is not None for grad in self._grads()]

    def forget_grads(self, keep: Sequence[bool]) -> None:
        """Mark pieces of gradients absent, but for those told to keep."""
        for parameter, kept in zip(self.members, keep, strict=True):
            if not kept:
                parameter.zero_grad()

    def landing_place(self) -> Loan:
        """Return memory for the shard of a reduced gradient: where it stays, if that can be."""
        fits = self._dtype == self.reduce_dtype and self._home is self.namespace
        if fits and not self.landing and not any(self.has_grad):
            self.landing = True
            return own(self._grad_memory())
        return self._take_piece(self.reduce_dtype)

    def land(self, reduced: Array) -> None:
        """Add the shard of a reduced gradient to what there is of each parameter."""
        memory = self._grad_memory()
        reduced = moved(reduced, self._home)
        slots, news = self._cut(memory), self._cut(reduced)
        grads = self._grads()
        for index, parameter in enumerate(self.members):
            grad, new, slot = grads[index], news[index], slots[index]
            if not parameter.requires_grad:
                continue
            if grad is not None:
                grad += new.astype(grad.dtype, copy=False)
                continue
            if reduced is not memory:
                slot[...] = new
            if self._closed is not None:
                self._closed.grads[index] = slot
            else:
                parameter.hold(parameter.data, grad=slot, grad_memory=slot)
        if reduced is memory:
            self.landing = False

    # -- inside ----------------------------------------------------------------------------------

    def _grads(self) -> list[Array | None]:
        if self._closed is not None:
            return self._closed.grads
        return [parameter.grad for parameter in self.members]

    def _grad_memory(self) -> Array:
        if self._grad is None:
            memory: Array = self._home.empty(self.layout.shard_size, self._dtype)
            self._grad = memory
        return self._grad

    def _take(self, *, behind: bool = False) -> Loan:
        """Return memory for the whole, or for whole gradients, in the type of the computation."""
        take = self._plan.pool.take_behind if behind else self._plan.pool.take
        return take(self.namespace, self.layout.size, self._plan.precision.computed(self._dtype))

    def _take_piece(self, dtype: np.dtype) -> Loan:
        return self._plan.pool.take(self.namespace, self.layout.shard_size, dtype)

    def _own_part(self) -> Array:
        """Return memory for the shard: a part of the whole that stays, if it can be."""
        kept = None if self._kept is None else self._kept.array
        if kept is not None and kept.dtype == self._dtype and self._home is self.namespace:
            return kept[self.layout.shard(self._plan.rank)]
        shard: Array = self._home.empty(self.layout.shard_size, self._dtype)
        return shard

    def _cut(self, shard: Array) -> list[Array]:
        """Return views of a shard, one for each parameter: whole ones where nothing is cut."""
        if self._plan.shards is None:
            return self.layout.cut(shard)
        rank = self._plan.rank
        return [shard[self.layout.within(place, rank)] for place in self.layout.places]


class _Closed:
    """What to go back to when whole parameters become pieces again."""

    def __init__(self, members: Sequence[Parameter], *, backward: bool) -> None:
        self.backward = backward
        self.grads = [parameter.grad for parameter in members]
        self.deferred: list[list[Callable[[], None]] | None] = [
            parameter.deferred for parameter in members
        ]
