"""The collectives benchmark: which cases, measured by `ferro bench`, with the memory's speed."""

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
# Twice this on every rank is more than caches hold.
_COPIED_BYTES = 64 << 20
_COPY_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to measure.

    Attributes:
        sizes: of all_reduce, in bytes.
        other_sizes: of the other collectives.
        peers: the peers' interpreters, None for our own.
        rounds: turns that count, None for a number by size.
    """

    sizes: Sequence[int]
    other_sizes: Sequence[int]
    peers: Mapping[str, str | None]
    rounds: int | None


def measure(wanted: Wanted, ranks: int) -> dict[str, object]:
    """Measure all cases with this many ranks; return the results, ready for JSON.

    Raises:
        ArithmeticError: a result was wrong.
    """
    plans = [ferro_bench.WorldPlan(name="ferro", world_size=ranks, backend="gloo")]
    cores = min(ranks, usable_cores())
    plans.append(ferro_bench.WorldPlan(name="memory", world_size=cores, backend="gloo"))
    for name, python in wanted.peers.items():
        plans.append(
            ferro_bench.WorldPlan(name=name, world_size=ranks, peer=ferro_bench.find(name, python))
        )
    contestants = [*_OURS, *(ferro_bench.Contestant(name) for name in wanted.peers)]
    with ferro_bench.open_worlds(plans) as worlds:
        copies = [_copy_seconds(worlds, cores)]
        records = []
        for collective, nbytes in _cases(wanted):
            case = ferro_bench.make_case(collective, nbytes, ranks)
            rounds = wanted.rounds or ferro_bench.default_rounds(nbytes)
            measured = ferro_bench.measure(worlds, case, contestants, rounds)
            records.append(ferro_bench.summarize(case, ranks, measured))
            print(_line(records[-1]), flush=True)
            for name, it in measured.items():
                if it.wrong:
                    raise ArithmeticError(f"{name}: {it.wrong} wrong elements in {case}")
        copies.append(_copy_seconds(worlds, cores))
        versions = {name: world.version for name, world in worlds.items() if name != "memory"}
    moved = 2 * cores * _COPIED_BYTES  # each reads and writes
    bandwidth = moved / float(np.median(np.concatenate(copies)))
    print(f"memory, {cores} cores copying: {bandwidth / 1e9:.1f} GB/s", flush=True)
    return {"bandwidth_b_s": bandwidth, "versions": versions, "records": records}


def _cases(wanted: Wanted) -> Iterator[tuple[str, int]]:
    yield from (("all_reduce", size) for size in wanted.sizes)
    yield from ((other, size) for other in OTHERS for size in wanted.other_sizes)


def _copy_seconds(worlds: Mapping[str, ferro_bench.World], cores: int) -> np.ndarray:
    """Return how long a process for each core takes to copy an array of its own, all at once."""
    case = ferro_bench.make_case("copy", _COPIED_BYTES, cores, calls=1)
    memory = ferro_bench.Contestant("memory")
    return ferro_bench.measure(worlds, case, [memory], _COPY_ROUNDS)[memory.name].seconds.reshape(
        -1
    )


def _line(record: ferro_bench.Record) -> str:
    words = [f"{record['collective']:<14} {record['ranks']} ranks"]
    words.append(f"{ferro_bench.size_text(record['nbytes']):>8}")
    for name, result in record["results"].items():
        words.append(f"{name} {ferro_bench.time_text(result['median_s']):>8}")
    return "   ".join(words)
