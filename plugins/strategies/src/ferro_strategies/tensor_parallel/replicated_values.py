"""Whole values in a tensor-parallel model: rank 0's at the start, and gradients that must be equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array
from ..nn.checks import first_few
from ..nn.module import Buffer, Module
from ..nn.parameter import Parameter
from ..replicas import broadcast_arrays
from .summaries import differing, summary

_CHUNK_BYTES = 1 << 22


def is_whole(parameter: Parameter, group: ProcessGroup) -> bool:
    """Say whether every rank of the group holds the same values, not a piece of its own."""
    others = {*group.global_ranks} - {group.global_ranks[group.rank]}
    return not any(others & {*split.group.global_ranks} for split in parameter.splits)


def check_same_model(module: Module, group: ProcessGroup, strategy: str) -> None:
    """Compare names, shapes and dtypes of parameters, buffers and generators; all ranks call it.

    Raises:
        UsageError: they differ; raised on every rank, with the first difference.
    """
    own = [f"parameter {name!r}, {p.dtype} {p.shape}" for name, p in module.named_parameters()]
    own += [
        f"for parameter {name!r} the state {described}"
        for name, p in module.named_parameters()
        for described in sorted(owner.describe_state(p) for owner in p.state_owners)
    ]
    own += [f"buffer {name!r}, {b.data.dtype} {b.data.shape}" for name, b in module.named_buffers()]
    own += [f"generator {name!r}, {type(g.bit_generator).__name__}" for name, g in module.named_generators()]
    split = {name for name, parameter in module.named_parameters() if not is_whole(parameter, group)}
    own = [line for line in own if not any(line.startswith(f"parameter {name!r},") for name in split)]
    by_rank: list[list[str]] = group.all_gather_object(own)
    for rank, lines in enumerate(by_rank):
        if lines == by_rank[0]:
            continue
        least = min(len(lines), len(by_rank[0]))
        at = next((i for i in range(least) if lines[i] != by_rank[0][i]), least)
        here, there = (found[at] if at < len(found) else "nothing more" for found in (by_rank[0], lines))
        raise UsageError(
            f"{strategy} on group {group.name!r}: the models differ: where rank 0 has {here}, rank {rank} has "
            f"{there}. Build the same model on every rank. Nothing was changed.",
            group=group.name,
            rank=group.rank,
            peer=rank if group.rank == 0 else 0,
        )


def broadcast_whole_values(module: Module, group: ProcessGroup) -> None:
    """Give all ranks rank 0's parameters and buffers, but for the parameters that are in pieces already.

    Parameters that were built inside `deferred()` get their arrays.
    """
    module.materialize()
    held: list[Parameter | Buffer] = [p for p in module.parameters() if is_whole(p, group)]
    held += module.buffers()
    if group.world_size > 1 and held:
        broadcast_arrays(group, [holder.data for holder in held], 0, _CHUNK_BYTES)


class WholeGradientCheck:
    """A comparison of the gradients of whole parameters over the ranks of a tensor-parallel group.

    Parameters that every rank holds whole stay equal only if their gradients are equal. They are not where ranks got
    different batches, or where a layer sees some of the positions of sequence-parallel activations, so that its
    gradient is one term of a sum. Each gradient is described by two numbers when it is complete. The first gradient of
    each parameter is compared at once, inside the pullback; later ones travel together, in one small message for each
    backward pass.

    Args:
        parameters: qualified names and parameters, the same on all ranks. A deep copy of the model is not checked.
        group: the ranks.
    """

    def __init__(self, parameters: Sequence[tuple[str, Parameter]], group: ProcessGroup) -> None:
        self._names = [name for name, _ in parameters]
        self._group = group
        self._compared: set[int] = set()
        self._pending: dict[int, Array] = {}
        for index, (_, parameter) in enumerate(parameters):
            parameter.on_complete(self._listener(index))

    def _listener(self, index: int) -> _GradientListener:
        return _GradientListener(self, index)

    def completed(self, index: int, parameter: Parameter) -> None:
        """Note a gradient that is complete, and compare where that is due.

        Raises:
            UsageError: gradients differ between ranks; raised on every rank.
        """
        assert parameter.grad is not None, "a complete gradient is there"
        if index in self._pending:  # a new backward pass has begun
            pending, self._pending = self._pending, {}
            self._compare(pending)
        described = summary(parameter.grad)
        if index in self._compared:
            self._pending[index] = described
        else:
            self._compared.add(index)
            self._compare({index: described})

    def _compare(self, summaries: dict[int, Array]) -> None:
        indices = sorted(summaries)
        own = np.stack([summaries[index] for index in indices])
        differs = differing(own, self._group)
        found = [repr(self._names[index]) for index, bad in zip(indices, differs, strict=True) if bad]
        if found:
            raise UsageError(
                f"tensor parallel on group {self._group.name!r}: the gradients of {', '.join(first_few(found))} differ "
                "between the ranks, although every rank holds these parameters whole, so they would drift apart. "
                "All ranks must run the same batch. A layer between sequence-parallel layers sees some positions "
                "only: put SequenceParallelLayerNorm.from_serial into the plan for a LayerNorm, and SumGradients "
                "for other layers with whole parameters, or move them to where activations are whole.",
                group=self._group.name,
                rank=self._group.rank,
            )


class _GradientListener:
    """The function that a parameter calls when its gradient is complete."""

    def __init__(self, check: WholeGradientCheck, index: int) -> None:
        self._check = check
        self._index = index

    def __call__(self, parameter: Parameter) -> None:
        self._check.completed(self._index, parameter)
