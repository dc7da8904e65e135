"""SavePlan: what is written for a state, and by whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ferro import ProcessGroup
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.bundle import FILE_BYTES
from ferro_checkpoint.placement.local_array import LocalArray
from ferro_checkpoint.plan.agreement import Description, Holdings, agree_on_arrays
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.failures import check_same, tell_all
from ferro_checkpoint.plan.file_layout import FileLayout, layout_files
from ferro_checkpoint.plan.many_objects import without_collector
from ferro_checkpoint.plan.parts import LocalArrays, SegmentPart
from ferro_checkpoint.plan.replica_check import CHECKS, Check, compare_replicas
from ferro_checkpoint.plan.rows import HEADER, Rows, rows_of
from ferro_checkpoint.plan.segments import Segments, cut_segments
from ferro_checkpoint.plan.supplies import Supplies
from ferro_checkpoint.state.flatten import flatten
from ferro_checkpoint.state.value_agreement import agree_on_values
from ferro_checkpoint.state.values import Json

_LEAST_FILE_BYTES = 64 << 20


@dataclass(slots=True)
class SavePlan:
    """The plan of a save, which is the same on all ranks but for what is marked.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        values: of the state, for the record.
        holdings, layout, rows, segments, supplies: see there.
        local: this rank's arrays.
        written: numbers of the segments that this rank writes and needs no other rank for.
        exchanged: for each rank, numbers of the segments that it writes with parts from others.
        whole_files: whether a file must be written by one rank and in order.
        described: the digest of this rank's description; a plan is good for other arrays with the same.
        staged: for each segment of which this rank supplies something, where that begins in a copy of all it supplies.
        staged_bytes: size of that copy.
    """

    rank: int
    world_size: int
    values: dict[str, Json]
    holdings: Holdings
    layout: FileLayout
    rows: Rows
    segments: Segments
    supplies: Supplies
    local: LocalArrays
    written: list[int]
    exchanged: list[list[int]]
    whole_files: bool
    described: str
    staged: dict[int, int] = field(default_factory=dict)
    staged_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self.layout.bases[-1]

    @property
    def written_bytes(self) -> int:
        """Bytes that this rank writes."""
        own = [*self.written, *self.exchanged[self.rank]]
        return sum(self.segments.end[number] - self.segments.begin[number] for number in own)

    def own_parts(self, number: int) -> list[SegmentPart]:
        """List the parts of a segment that this rank supplies from its arrays, in order."""
        return [part for part in self.supplies.of(number) if part.rank == self.rank and part.tensor != HEADER]

    def header_bytes(self, number: int, part: SegmentPart) -> bytes:
        """Return the bytes of a header in a segment."""
        file = self.layout.files[self.layout.file_at(self.segments.begin[number])]
        return file.header[part.lo : part.hi]

    def segments_with_own_parts(self) -> Iterator[int]:
        """List the segments of which this rank may supply something."""
        yield from self.written
        for numbers in self.exchanged:
            yield from numbers


def plan_save(
    state: object,
    group: ProcessGroup | None,
    *,
    writes_ranges: bool = True,
    previous: SavePlan | None = None,
    check_replicas: Check = "sampled",
    same: Mapping[str, object] | None = None,
    refused: StateError | None = None,
    timeout_s: float = 600.0,
) -> SavePlan:
    """Find out what all ranks' states hold, and who writes what; all ranks of the group call it.

    Args:
        state: what is to be saved.
        group: the ranks; None for this process alone.
        writes_ranges: `Storage.writes_ranges`.
        previous: an earlier plan, which is used again where nothing has changed but the arrays' elements.
        check_replicas: see `plan.replica_check`.
        same: what all ranks must have given alike, by the names that messages have: values of JSON.
        refused: why this rank does not save, if so.
        timeout_s: deadline of all collectives together.

    Raises:
        StateError: the state cannot be saved, or ranks disagree; on all ranks alike.
    """
    deadline = Deadline(timeout_s)
    rank, world_size = (0, 1) if group is None else (group.rank, group.world_size)
    if check_replicas not in CHECKS:
        raise StateError(f"check_replicas is {check_replicas!r}; it is one of {', '.join(map(repr, CHECKS))}")
    try:
        if refused is not None:
            raise refused
        with without_collector():
            flat = flatten(state, rank)
            local = [LocalArray(name, piece) for name, piece in flat.pieces]
            described = Description(local)
    except Exception as error:
        tell_all(group, error, deadline)
        raise
    again = previous is not None and previous.whole_files != writes_ranges and previous.described == described.digest
    told = tell_all(group, None, deadline, [again, dict(same or {})])
    check_same([given for _, given in told])
    values = agree_on_values(flat.values, flat.by_rank, group, deadline)
    if previous is not None and all(each for each, _ in told):
        plan = previous
        plan.values, plan.local = values, LocalArrays(local, plan.holdings.names)
    else:
        plan = _plan(local, described, values, group, deadline, whole_files=not writes_ranges)
    if group is not None and world_size > 1:
        compare_replicas(plan.rows, plan.holdings, plan.layout, plan.local, group, check_replicas, deadline)
    return plan


def _plan(
    local: Sequence[LocalArray],
    described: Description,
    values: dict[str, Json],
    group: ProcessGroup | None,
    deadline: Deadline,
    *,
    whole_files: bool,
) -> SavePlan:
    rank, world_size = (0, 1) if group is None else (group.rank, group.world_size)
    holdings = agree_on_arrays(described, group, deadline)
    with without_collector():
        nbytes = int((holdings.sizes * holdings.itemsizes).sum())
        file_bytes = FILE_BYTES
        if whole_files:  # so that every rank has one to write
            file_bytes = max(min(FILE_BYTES, -(-nbytes // world_size)), _LEAST_FILE_BYTES)
        layout = layout_files(holdings, file_bytes)
        rows = rows_of(holdings, layout, world_size)
        segments = cut_segments(rows, layout, world_size, whole_files=whole_files)
        written: list[int] = []
        exchanged: list[list[int]] = [[] for _ in range(world_size)]
        for number, (writer, needs) in enumerate(zip(segments.writer, segments.exchanged, strict=True)):
            if needs and world_size > 1:
                exchanged[writer].append(number)
            elif writer == rank:
                written.append(number)
        supplies = Supplies(holdings, layout, rows, segments)
        arrays = LocalArrays(local, holdings.names)
        return SavePlan(
            rank,
            world_size,
            values,
            holdings,
            layout,
            rows,
            segments,
            supplies,
            arrays,
            written,
            exchanged,
            whole_files,
            described.digest,
        )
