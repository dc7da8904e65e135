"""Time collectives by `ferro bench`, and measure the memory bandwidth in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import ferro_bench
from ferro.runtime.environment import usable_cores

SIZES = "4B:256MiB"
QUICK_SIZES = "4B,64KiB,4MiB"
OTHER_SIZES = "4KiB,64KiB,256KiB,1MiB,16MiB,64MiB"
OTHER_QUICK_SIZES = "64KiB"
MANY_SIZES = "4B,64KiB,1MiB"
MANY_RANKS = (2, 4, 8, 16)
OTHERS = ("all_gather", "reduce_scatter", "broadcast", "all_to_all")

_OURS = (ferro_bench.Contestant("ferro", "private"), ferro_bench.Contestant("ferro", "group"))
QUICK_ROUNDS = 2
MANY_ROUNDS = 10
# Two arrays of this size on every rank do not fit into caches.
_COPIED_BYTES = 64 << 20
_COPY_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The cases to measure.

    Attributes:
        sizes: sizes of all_reduce, in bytes.
        other_sizes: sizes of the other collectives.
        peers: each peer library's interpreter, None for this one.
        rounds: number of timed turns, None for a number that depends on the size.
    """

    sizes: Sequence[int]
    other_sizes: Sequence[int]
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
    for name, python in selection.peers.items():
        plans.append(ferro_bench.WorldPlan(name=name, world_size=ranks, peer=ferro_bench.find(name, python)))
    contestants = [*_OURS, *(ferro_bench.Contestant(name) for name in selection.peers)]
    with ferro_bench.open_worlds(plans) as worlds:
        copies = [_copy_seconds(worlds, cores)]
        records = []
        for collective, nbytes in _cases(selection):
            case = ferro_bench.make_case(collective, nbytes, ranks)
            rounds = selection.rounds or ferro_bench.default_rounds(nbytes)
            measured = ferro_bench.measure(worlds, case, contestants, rounds)
            records.append(ferro_bench.summarize(case, ranks, measured))
            print(_line(records[-1]), flush=True)
            for name, result in measured.items():
                if result.wrong:
                    raise ArithmeticError(f"{name}: {result.wrong} wrong elements in {case}")
        copies.append(_copy_seconds(worlds, cores))
        versions = {name: world.version for name, world in worlds.items() if name != "memory"}
    moved = 2 * cores * _COPIED_BYTES  # each core reads and writes
    bandwidth = moved / float(np.median(np.concatenate(copies)))
    print(f"memory, {cores} cores copying: {bandwidth / 1e9:.1f} GB/s", flush=True)
    return {"bandwidth_b_s": bandwidth, "versions": versions, "records": records}


def _cases(selection: Selection) -> Iterator[tuple[str, int]]:
    yield from (("all_reduce", size) for size in selection.sizes)
    yield from ((other, size) for other in OTHERS for size in selection.other_sizes)


def _copy_seconds(worlds: Mapping[str, ferro_bench.BenchWorld], cores: int) -> np.ndarray:
    """Return the seconds in which all cores at once copy an array of their own."""
    case = ferro_bench.make_case("copy", _COPIED_BYTES, cores, calls=1)
    memory = ferro_bench.Contestant("memory")
    return ferro_bench.measure(worlds, case, [memory], _COPY_ROUNDS)[memory.name].seconds.reshape(-1)


def _line(record: ferro_bench.BenchRecord) -> str:
    words = [f"{record['collective']:<14} {record['ranks']} ranks"]
    words.append(f"{ferro_bench.size_text(record['nbytes']):>8}")
    for name, result in record["results"].items():
        words.append(f"{name} {ferro_bench.time_text(result['median_s']):>8}")
    return "   ".join(words)
