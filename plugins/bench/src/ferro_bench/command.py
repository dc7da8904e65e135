"""`ferro bench`: measure, print each result at once, and write all results to a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from ferro import backends
from ferro.errors import BackendUnavailable, UsageError
from ferro.launch.processes import exit_on_signals
from ferro.runtime.environment import usable_cores
from ferro_bench.contestants import Contestant, WorldPlan
from ferro_bench.driver import open_worlds
from ferro_bench.measure import default_rounds, make_case, measure
from ferro_bench.options import BenchOptions
from ferro_bench.peers import PEERS, find
from ferro_bench.plot import plot, require_matplotlib
from ferro_bench.summary import BenchRecord, summarize
from ferro_bench.table import ResultTable, legend, spread
from ferro_bench.world import BenchWorld


def run(options: BenchOptions) -> int:
    """Measure; return the exit status: 0, or 1 when a result was wrong.

    Raises:
        UsageError: a peer or matplotlib is not installed, or a file cannot be written.
        BackendError: a library's ranks died or hung; the message has the end of their output.
    """
    with exit_on_signals():
        return _run(options)


def _run(options: BenchOptions) -> int:
    if options.plot is not None:
        require_matplotlib()
    if options.backend is not None:
        _require_usable(options.backend)
    plans = [_own_world(options, algorithm) for algorithm in options.algorithms]
    for name, python in options.peers.items():
        plans.append(WorldPlan(name=name, world_size=options.ranks, peer=find(name, python)))
    stream = sys.stderr if options.json == "-" else sys.stdout
    was_busy = busy()
    with open_worlds(plans) as worlds:
        versions = {name: world.version for name, world in worlds.items()}
        _print(stream, f"# {options.ranks} ranks; " + "; ".join(dict.fromkeys(versions.values())))
        records = [r for name in options.collectives for r in _rows(options, name, worlds, stream)]
    for line in [*legend(list(options.peers), persistent=options.persistent), *was_busy, *spread(records)]:
        _print(stream, f"# {line}")
    wrong = sum(result["wrong"] for record in records for result in record["results"].values())
    if options.check:
        _print(stream, f"# wrong elements: {wrong}")
    _write_results(options, versions, records)
    return 1 if wrong else 0


def _require_usable(backend: str) -> None:
    """Refuse a backend that is not there, before any rank starts."""
    found = backends.probe(backends.get(backend))
    if not found.ok:
        raise BackendUnavailable(backend, found.reason, found.hint)


def _own_world(options: BenchOptions, algorithm: str) -> WorldPlan:
    fixed = tuple((name, algorithm) for name in dict.fromkeys(options.collectives)) if algorithm else ()
    name = _world_name(algorithm)
    return WorldPlan(name=name, world_size=options.ranks, backend=options.backend or "", algorithms=fixed)


def _world_name(algorithm: str) -> str:
    return f"ferro-{algorithm}" if algorithm else "ferro"


def busy() -> list[str]:
    """Say that the machine is busy, where others use half of its cores or more; in a line, or none."""
    load, cores = os.getloadavg()[0], usable_cores()
    if load < cores / 2:
        return []
    return [f"this machine was busy before the start: load average {load:.1f} on {cores} cores; try it when it is idle"]


def _rows(
    options: BenchOptions, collective: str, worlds: Mapping[str, BenchWorld], stream: TextIO
) -> list[BenchRecord]:
    kinds = (False, True) if options.persistent else (False,)
    ours = [
        Contestant(_world_name(algorithm), memory, algorithm, persistent)
        for persistent in kinds
        for algorithm in options.algorithms
        for memory in options.memories
    ]
    peers = list(options.peers) if collective != "copy" else []
    others = [
        Contestant(name, persistent=persistent)
        for persistent in kinds
        for name in peers
        if PEERS[name].persistent or not persistent
    ]
    _print(stream, f"# {collective}")
    table = ResultTable(stream, collective, ours, peers)
    records = []
    for nbytes in options.sizes if collective != "barrier" else options.sizes[:1]:
        case = make_case(
            collective,
            nbytes,
            options.ranks,
            dtype=options.dtype,
            op=options.op,
            calls=options.calls,
            check=options.check,
            async_op=options.async_op,
            apart=options.apart,
        )
        rounds = options.rounds or default_rounds(nbytes)
        measured = measure(worlds, case, [*ours, *others], rounds)
        records.append(summarize(case, options.ranks, measured))
        table.add(records[-1])
    return records


def _write_results(options: BenchOptions, versions: Mapping[str, str], records: Sequence[BenchRecord]) -> None:
    if options.json is not None:
        text = json.dumps({"versions": versions, "records": records}, indent=1)
        if options.json == "-":
            _print(sys.stdout, text)
        else:
            try:
                Path(options.json).write_text(text + "\n")
            except OSError as exc:
                raise UsageError(f"--json {options.json}: {exc.strerror}") from exc
    if options.plot is not None:
        plot(records, options.plot)


def _print(stream: TextIO, line: str) -> None:
    print(line, file=stream, flush=True)
