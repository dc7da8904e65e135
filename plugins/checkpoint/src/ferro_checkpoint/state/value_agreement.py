"""The values of all ranks' states, as the record holds them."""

from __future__ import annotations

from collections.abc import Mapping

import xxhash

from ferro import ProcessGroup
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.json_text import MOST_VALUES, read_json, write_json
from ferro_checkpoint.layout.record import MOST_RECORD_BYTES
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.state.values import Json

BY_RANK = "$by_rank"


_MOST_TEXT_BYTES = MOST_RECORD_BYTES // 2  # the rest is for the digests
_MOST_VALUES = MOST_VALUES // 2


def agree_on_values(
    values: Mapping[str, Json], by_rank: set[str], group: ProcessGroup | None, deadline: Deadline
) -> dict[str, Json]:
    """Unite the values of all ranks; all of them call it, and get the same.

    A value that is the same on every rank that has it is kept once. Others are kept as {"$by_rank": [rank 0's, …]},
    with {"$none": true} for ranks that have none.

    Args:
        values: this rank's, by path.
        by_rank: paths of values of which every rank has its own, even where all are the same.
        group: the ranks.
        deadline: of the collectives.

    Raises:
        StateError: they are more than a record can hold; on all ranks alike.
    """
    united = _unite(values, by_rank, group, deadline)
    text = write_json(united)
    if len(text) > _MOST_TEXT_BYTES or sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        largest = max(united, key=lambda path: len(write_json(united[path])))
        raise StateError(
            f"the values of the state take {len(text)} bytes as JSON, more than a checkpoint can hold; most are in "
            f"{largest!r}: give an array in its place"
        )
    return united


def _unite(
    values: Mapping[str, Json], by_rank: set[str], group: ProcessGroup | None, deadline: Deadline
) -> dict[str, Json]:
    if group is None or group.world_size == 1:
        return {path: {BY_RANK: [value]} if path in by_rank else value for path, value in values.items()}
    shared = {path: value for path, value in values.items() if path not in by_rank}
    own = {path: xxhash.xxh3_128_hexdigest(write_json(value)) for path, value in shared.items()}
    everything = xxhash.xxh3_128_hexdigest(write_json(own))
    told = group.all_gather_object([everything, sorted(by_rank)], timeout_s=deadline.left_s())
    separate = {path for _, paths in told for path in paths}
    if len({digest for digest, _ in told}) > 1:
        digests = group.all_gather_object(own, timeout_s=deadline.left_s())
        paths = {path for each in digests for path in each}
        separate |= {path for path in paths if len({each.get(path) for each in digests}) > 1}
    united: dict[str, Json] = {path: value for path, value in shared.items() if path not in separate}
    if separate:
        texts = group.all_gather_object(
            {path: write_json(values[path]).decode() for path in separate if path in values},
            timeout_s=deadline.left_s(),
        )
        for path in sorted(separate):
            united[path] = {
                BY_RANK: [read_json(each[path].encode()) if path in each else {"$none": True} for each in texts]
            }
    return united


def values_of_rank(values: Mapping[str, Json], rank: int) -> tuple[dict[str, Json], list[str]]:
    """Choose a rank's values of a record.

    Returns:
        The values by path, and the paths of values that other ranks have and this one has not.
    """
    own: dict[str, Json] = {}
    lacking = []
    for path, value in values.items():
        if isinstance(value, dict) and isinstance(each := value.get(BY_RANK), list) and len(value) == 1:
            if rank < len(each) and each[rank] != {"$none": True}:
                own[path] = each[rank]
            else:
                lacking.append(path)
        else:
            own[path] = value
    return own, lacking
