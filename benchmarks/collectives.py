"""One rank of the collectives benchmark: ferro beside torch gloo, in the same processes.

`run.py` starts it with `ferro run -n N`. For every case both libraries take turns:

    round 0   [ferro  block] [torch  block]      a block: renew all buffers, barrier,
    round 1   [torch  block] [ferro  block]      one call to settle, then timed calls,
    round 2   [ferro  block] [torch  block]      then compare every result
    …

The barrier is ferro's for both. Where a call takes so long that a block has only one, there is no
call to settle. The first round is not counted. A call takes as long as on its slowest rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pattern import blocks_hold, fill, fill_blocks, holds
from peers import FerroPeer, Peer, TorchPeer
from units import size_text, time_text

import ferro

_BLOCK_BYTES = 8 << 20
_BLOCK_CALLS = 20
_ITEM = np.dtype(np.float32).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        collective: its name.
        nbytes: size of the whole buffer: the result of all_gather, the input of the others.
        calls: timed calls in a block.
        rounds: rounds that count.
    """

    collective: str
    nbytes: int
    calls: int
    rounds: int


def case_of(collective: str, nbytes: int, *, quick: bool) -> Case:
    """Return the case with so many calls that it takes a few seconds, and the medians settle."""
    calls = max(1, min(_BLOCK_CALLS, _BLOCK_BYTES // nbytes))
    rounds = 40 if nbytes <= 1 << 20 else 24 if nbytes <= 16 << 20 else 12
    if nbytes > 64 << 20:
        rounds = 8
    return Case(
        collective=collective,
        nbytes=nbytes,
        calls=calls,
        rounds=max(2, rounds // 8) if quick else rounds,
    )


class Buffers:
    """The memory of one call on one rank, with what goes in and what must come out."""

    def __init__(self, case: Case, rank: int, world_size: int) -> None:
        self._collective = case.collective
        self._rank = rank
        self._scales = [r + 1 for r in range(world_size)]
        count = case.nbytes // _ITEM
        whole = np.ones(count, np.float32)  # touched here: first use of a page is not timed
        self.source = self.target = whole
        if case.collective == "all_gather":
            self.source = np.ones(count // world_size, np.float32)
        elif case.collective == "reduce_scatter":
            self.target = np.ones(count // world_size, np.float32)

    def renew(self) -> None:
        """Write the input again, and over the last result."""
        own = self._scales[self._rank]
        fill(self.target, 99)
        if self._collective == "reduce_scatter":
            fill_blocks(self.source, [own * scale for scale in self._scales])
        else:
            fill(self.source, own)

    def right(self) -> bool:
        """Say whether the result is what it must be, to the bit."""
        total = sum(self._scales)
        if self._collective == "all_reduce":
            return holds(self.target, total)
        if self._collective == "broadcast":
            return holds(self.target, self._scales[0])
        if self._collective == "all_gather":
            return blocks_hold(self.target, self._scales)
        return holds(self.target, total * self._scales[self._rank])


def measure(
    case: Case, peers: Sequence[Peer], group: ferro.ProcessGroup
) -> dict[str, npt.NDArray[np.float64]]:
    """Return for each peer the seconds of every timed call, shape (rounds, calls).

    Raises:
        ArithmeticError: a result was wrong.
    """
    settle = 1 if case.calls > 1 else 0
    memory = [Buffers(case, group.rank, group.world_size) for _ in range(settle + case.calls)]
    seconds: dict[str, list[list[float]]] = {peer.name: [] for peer in peers}
    for turn in range(-1, case.rounds):
        for peer in peers if turn % 2 == 0 else tuple(reversed(peers)):
            times = _block(case, peer, memory, group)[settle:]
            if turn >= 0:
                seconds[peer.name].append(times)
    return {name: _slowest(np.array(times), group) for name, times in seconds.items()}


def _block(
    case: Case, peer: Peer, memory: Sequence[Buffers], group: ferro.ProcessGroup
) -> list[float]:
    for buffers in memory:
        buffers.renew()
    calls = [peer.operation(case.collective, b.source, b.target) for b in memory]
    marks = [0.0] * (len(calls) + 1)
    group.barrier()
    marks[0] = time.perf_counter()
    for index, call in enumerate(calls, 1):
        call()
        marks[index] = time.perf_counter()
    if not all(buffers.right() for buffers in memory):
        raise ArithmeticError(f"{peer.name}: wrong result of {case} on rank {group.rank}")
    return np.diff(marks).tolist()


def _slowest(own: npt.NDArray[np.float64], group: ferro.ProcessGroup) -> npt.NDArray[np.float64]:
    """Return, for every call, the time of the rank that took longest."""
    return group.all_reduce(own, "max")


def summary(case: Case, seconds: dict[str, npt.NDArray[np.float64]]) -> dict[str, object]:
    """Return what is kept of a case, ready for JSON."""
    record: dict[str, object] = asdict(case)
    for name, times in seconds.items():
        low, middle, high = np.quantile(times, [0.1, 0.5, 0.9])
        record[name] = {
            "median_s": middle,
            "min_s": times.min(),
            "p10_s": low,
            "p90_s": high,
        }
    if "torch" in seconds:
        ours, theirs = (np.median(seconds[name], axis=1) for name in ("ferro", "torch"))
        record["ratio"] = float(np.median(seconds["torch"]) / np.median(seconds["ferro"]))
        record["rounds_won"] = statistics.fmean(ours <= theirs)
    return record


def _line(record: dict[str, object], ranks: int) -> str:
    words = [f"{record['collective']:<14} {ranks} ranks {size_text(record['nbytes']):>8}"]
    words += [
        f"{name} {time_text(record[name]['median_s']):>8}"
        for name in ("ferro", "torch")
        if name in record
    ]
    if "ratio" in record:
        words.append(f"ratio {record['ratio']:5.2f}, rounds won {record['rounds_won']:4.0%}")
    return "   ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--case", action="append", required=True, help="collective:bytes")
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    records = []
    with ferro.init("gloo") as group:
        peers: list[Peer] = [FerroPeer(group)]
        if not options.without_torch:
            peers.append(TorchPeer())
        for text in options.case:
            collective, _, nbytes = text.partition(":")
            case = case_of(collective, int(nbytes), quick=options.quick)
            records.append(summary(case, measure(case, peers, group)))
            if group.rank == 0:
                print(_line(records[-1], group.world_size), flush=True)
        if group.rank == 0:
            options.out.write_text(json.dumps(records, indent=1))
        for peer in peers:
            peer.close()


if __name__ == "__main__":
    main()
