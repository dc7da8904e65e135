"""Ties: parameters that several stages share, of which each stage has a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ferro import ProcessGroup

from ...nn.arrays import namespace_of
from ...nn.parameter import Parameter
from ...optim.checkpointed_state import CheckpointedState

# Maps each stage that has a copy to the parameter's qualified name in it.
Tie: TypeAlias = Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _LocalTie:
    """One tie, on a rank that has copies.

    Attributes:
        copies: the copies of this rank, each object once, first stage first.
        group: the ranks with copies.
        root: the rank in this group that has the first stage's copy.
    """

    copies: tuple[Parameter, ...]
    group: ProcessGroup
    root: int


class ParameterTies:
    """Keeps tied copies equal: they start with equal values, and get equal gradients in every step.

    Args:
        group: the pipeline's ranks; all make this object, with the same ties.
        rank_of: the rank of each stage.
        parameters: the parameters of this rank's stages, by stage and name.
        ties: all ties of the pipeline.

    Attributes:
        exist: whether the pipeline has ties, on this rank or another.
    """

    def __init__(
        self,
        group: ProcessGroup,
        rank_of: Sequence[int],
        parameters: Mapping[int, Mapping[str, Parameter]],
        ties: Sequence[Tie],
    ) -> None:
        groups: dict[tuple[int, ...], ProcessGroup] = {}
        self.exist = bool(ties)
        self._local_ties: list[_LocalTie] = []
        # All ranks go through the ties in one order, here and below, so there is no deadlock.
        for tie in ties:
            ranks = tuple(sorted({rank_of[stage] for stage in tie}))
            if group.rank not in ranks:
                continue
            if ranks not in groups:
                groups[ranks] = group.subgroup(ranks)
            own = [parameters[s][tie[s]] for s in sorted(tie) if rank_of[s] == group.rank]
            copies = tuple({id(copy): copy for copy in own}.values())
            first = rank_of[min(tie)]
            self._local_ties.append(_LocalTie(copies=copies, group=groups[ranks], root=ranks.index(first)))
            for copy in copies[1 if first == group.rank else 0 :]:
                copy.tied_copy = True

    def share_values(self) -> None:
        """Give every copy the value of the first stage's copy."""
        for tie in self._local_ties:
            first = tie.copies[0].data
            tie.group.broadcast(first, tie.root, out=first)
            for copy in tie.copies[1:]:
                copy.data[...] = first

    def clear_duplicate_gradients(self) -> None:
        """Clear the gradients of all copies but the first before a step.

        Every copy has the sum from earlier steps, which `sum_gradients` would otherwise add several times.
        """
        for tie in self._local_ties:
            for copy in tie.copies:
                if copy.tied_copy:
                    copy.zero_grad()

    def sum_gradients(self) -> None:
        """Give every copy the sum of all copies' gradients; an absent gradient counts as zero."""
        for tie in self._local_ties:
            first, *others = tie.copies
            if not first.requires_grad:  # then all copies are frozen, on every rank
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

    def follow_loaded(self) -> None:
        """Give this rank's further copies of a parameter what a checkpoint has loaded into the first."""
        for tie in self._local_ties:
            first = tie.copies[0]
            for copy in tie.copies[1:]:
                copy.data[...] = first.data
                for owner in copy.state_owners:
                    if isinstance(owner, CheckpointedState):
                        owner.copy_state(first, copy)
