"""Ties: parameters that several stages share, each with a copy of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ferro import ProcessGroup

from ..nn.arrays import namespace_of
from ..nn.parameter import Parameter

# For each stage that has a copy, its qualified name there.
Tie: TypeAlias = Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """One tie, as a rank that has copies sees it.

    Attributes:
        copies: those of this rank, each object once, first stage first.
        group: the ranks with copies.
        root: which of them has the first stage's.
    """

    copies: tuple[Parameter, ...]
    group: ProcessGroup
    root: int


class Ties:
    """Keeps tied copies equal, by equal values at first and equal gradients ever after.

    Args:
        group: the pipeline's ranks; all make this object, with the same ties.
        rank_of: the rank of each stage.
        parameters: those of this rank's stages, by stage and name.
        ties: which are tied.
    """

    def __init__(
        self,
        group: ProcessGroup,
        rank_of: Sequence[int],
        parameters: Mapping[int, Mapping[str, Parameter]],
        ties: Sequence[Tie],
    ) -> None:
        groups: dict[tuple[int, ...], ProcessGroup] = {}
        self._held: list[_Held] = []
        self._counted_elsewhere: set[int] = set()
        # All ranks go through the ties in one order, here and below, so none waits in a circle.
        for tie in ties:
            ranks = tuple(sorted({rank_of[stage] for stage in tie}))
            if group.rank not in ranks:
                continue
            if ranks not in groups:
                groups[ranks] = group.subgroup(ranks)
            mine = [parameters[s][tie[s]] for s in sorted(tie) if rank_of[s] == group.rank]
            copies = tuple({id(copy): copy for copy in mine}.values())
            first = rank_of[min(tie)]
            self._held.append(_Held(copies=copies, group=groups[ranks], root=ranks.index(first)))
            counted = 1 if first == group.rank else 0
            self._counted_elsewhere.update(id(copy) for copy in copies[counted:])

    def share_values(self) -> None:
        """Give every copy the value of the first stage's."""
        for tie in self._held:
            first = tie.copies[0].data
            tie.group.broadcast(first, tie.root, out=first)
            for copy in tie.copies[1:]:
                copy.data[...] = first

    def begin(self) -> None:
        """Leave what earlier steps have added up, and every copy has, with the first copy only."""
        for tie in self._held:
            for copy in tie.copies:
                if id(copy) in self._counted_elsewhere:
                    copy.zero_grad()

    def sum_gradients(self) -> None:
        """Give every copy the sum of all copies' gradients; those without count as zero."""
        for tie in self._held:
            first, *others = tie.copies
            if not first.requires_grad:  # and so all copies, on every rank
                continue
            if first.grad is None:
                first.grad = namespace_of(first.data).zeros_like(first.data)
            assert first.grad is not None
            for copy in others:
                if copy.grad is not None:
                    first.grad += copy.grad
            tie.group.all_reduce(first.grad, out=first.grad)
            for copy in others:
                copy.grad = first.grad

    def once(self, parameters: Iterator[Parameter]) -> list[Parameter]:
        """Return those parameters that this rank is to count, of each tie the first copy only."""
        return [item for item in parameters if id(item) not in self._counted_elsewhere]
