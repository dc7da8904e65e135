"""Time collectives by `ferro bench`: every collective, size, number of ranks and memory, beside every peer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import ratios
from records import Record

import ferro_bench
from ferro.runtime.environment import usable_cores

OPS = (
    *("all_reduce", "broadcast", "reduce", "all_gather", "gather"),
    *("scatter", "reduce_scatter", "all_to_all", "barrier"),
)
SIZES = "4B:64MiB"  # 13 sizes
RANKS = (2, 4, 8)
QUICK_SIZES = "4B,64KiB,1MiB"
QUICK_RANKS = (2, 4)
QUICK_ROUNDS = 2
MANY_SIZES = "4B,64KiB,1MiB"
MANY_RANKS = (16,)
MANY_ROUNDS = 10

_OURS = (
    ferro_bench.Contestant("ferro", "private"),
    ferro_bench.Contestant("ferro", "group"),
    ferro_bench.Contestant("ferro", "private", persistent=True),
)
# After this time a case gets no more turns than it needs. The sum over all cases is some 15 minutes.
_CASE_S = 1.0
# Ranks of these may run ahead of others through several small calls, so they are measured also with a barrier before
# each call, as the OSU micro-benchmarks do.
_ROOTED = frozenset(("broadcast", "reduce", "gather", "scatter"))
_APART_BYTES = 64 << 10
# Open MPI's collectives over one shared segment are of use only where each rank has a core.
_WITH_CORES = "openmpi-sm"
# Two arrays of this size on every rank do not fit into caches.
_COPIED_BYTES = 64 << 20
_COPY_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The cases to measure.

    Attributes:
        ops: the collectives.
        sizes: in bytes, of the whole buffer; a barrier has none.
        peers: each peer library's interpreter, None for this one.
        rounds: number of timed turns, None for a number that depends on size and time.
    """

    ops: Sequence[str]
    sizes: Sequence[int]
    peers: Mapping[str, str | None]
    rounds: int | None


def measure(selection: Selection, ranks: int) -> dict[str, object]:
    """Measure all cases with this many ranks, and return the results for JSON.

    Raises:
        ArithmeticError: a result was wrong.
    """
    plans = [ferro_bench.WorldPlan(name="ferro", world_size=ranks, backend="gloo")]
    cores = min(ranks, usable_cores())
    plans.append(ferro_bench.WorldPlan(name="memory", world_size=cores, backend="gloo"))
    peers = [name for name in selection.peers if name != _WITH_CORES or ranks <= usable_cores()]
    for name in peers:
        peer = ferro_bench.find(name, selection.peers[name])
        plans.append(ferro_bench.WorldPlan(name=name, world_size=ranks, peer=peer))
    with ferro_bench.open_worlds(plans) as worlds:
        copies = [_copy_seconds(worlds, cores)]
        records = [
            {"size": size, **_record(worlds, case, ranks, peers, selection.rounds)}
            for size, case in _cases(selection, ranks)
        ]
        copies.append(_copy_seconds(worlds, cores))
        versions = {name: world.version for name, world in worlds.items() if name != "memory"}
    moved = 2 * cores * _COPIED_BYTES  # each core reads and writes
    bandwidth = moved / float(np.median(np.concatenate(copies)))
    print(f"memory, {cores} cores copying: {bandwidth / 1e9:.1f} GB/s", flush=True)
    return {"bandwidth_b_s": bandwidth, "versions": versions, "records": records}


def merged(earlier: Record, now: Record) -> Record:
    """Return the results of a part of all cases, `now`, with those of the other cases from an `earlier` run."""
    cases = {_case_key(record): record for record in [*earlier["records"], *now["records"]]}
    return {**now, "records": sorted(cases.values(), key=_case_key), "versions": earlier["versions"] | now["versions"]}


def _case_key(record: Record) -> tuple[int, bool, int]:
    return OPS.index(record["collective"]), record["apart"], record["size"]


def _cases(selection: Selection, ranks: int) -> Iterator[tuple[int, ferro_bench.BenchCase]]:
    """Yield each case with its size; a buffer that is cut into blocks is larger if it has fewer elements than ranks."""
    for op in selection.ops:
        for size in selection.sizes if op != "barrier" else (0,):
            yield size, ferro_bench.make_case(op, max(size, 1), ranks)
        if op in _ROOTED:
            for size in selection.sizes:
                if size <= _APART_BYTES:
                    yield size, ferro_bench.make_case(op, size, ranks, apart=True)


def _record(
    worlds: Mapping[str, ferro_bench.BenchWorld],
    case: ferro_bench.BenchCase,
    ranks: int,
    peers: Sequence[str],
    rounds: int | None,
) -> dict[str, object]:
    ours = [one for one in _OURS if case.count or one.memory == "private"]  # a barrier has no memory
    others = [ferro_bench.Contestant(name) for name in peers]
    others += [ferro_bench.Contestant(name, persistent=True) for name in peers if ferro_bench.PEERS[name].persistent]
    turns = rounds or ferro_bench.default_rounds(4 * case.count)
    measured = ferro_bench.measure(worlds, case, [*ours, *others], turns, _CASE_S)
    record = ferro_bench.summarize(case, ranks, measured)
    print(_line(record), flush=True)
    for name, result in measured.items():
        if result.wrong:
            raise ArithmeticError(f"{name}: {result.wrong} wrong elements in {case}")
    return {**record, "measured": datetime.now(UTC).isoformat(timespec="minutes")}


def _copy_seconds(worlds: Mapping[str, ferro_bench.BenchWorld], cores: int) -> np.ndarray:
    """Return the seconds in which all cores at once copy an array of their own."""
    case = ferro_bench.make_case("copy", _COPIED_BYTES, cores, calls=1)
    memory = ferro_bench.Contestant("memory")
    return ferro_bench.measure(worlds, case, [memory], _COPY_ROUNDS)[memory.name].seconds.reshape(-1)


def _line(record: ferro_bench.BenchRecord) -> str:
    words = [f"{ratios.row_name(record):<16} {record['ranks']} ranks"]
    words.append(f"{ferro_bench.size_text(record['nbytes']):>8}")
    for name, result in record["results"].items():
        words.append(f"{name} {ferro_bench.time_text(result['median_s']):>8}")
    return "   ".join(words)
