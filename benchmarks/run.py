"""Measure ferro beside torch.distributed gloo; write JSON, a Markdown page and plots.

    python benchmarks/run.py                                     everything, a few minutes
    python benchmarks/run.py --quick --only collectives --sizes 4,64K --ranks 2

Ranks are started with `ferro run`. All traffic goes over loopback, for both libraries. Nothing
here passes or fails by a time; a wrong result fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import imports
import machine
import report
from units import parse_size, time_text

_HERE = Path(__file__).resolve().parent
_NAMES = ("collectives", "imports", "ddp")
_SIZES = "4,16,64,256,1K,4K,16K,64K,256K,1M,4M,16M,64M,256M"
_QUICK_SIZES = "4,1K,64K,1M,16M"
_OTHERS = ("broadcast", "all_gather", "reduce_scatter")
_OTHER_SIZES = "4K,1M,16M"
_DDP_RANKS = 2
_DEADLINE_S = 1200.0
# Both libraries compute in one thread, and both stay on loopback.
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    measures = {"collectives": _collectives, "imports": _imports, "ddp": _ddp}
    for name in options.only or _NAMES:
        print(f"-- {name}", flush=True)
        result = {"machine": machine.facts(), "records": measures[name](options)}
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        if name == "collectives" and not options.without_torch:
            import plots  # needs matplotlib, which is of use only beside torch

            plots.plot(result["records"], options.out)
    written = {
        name: json.loads((options.out / f"{name}.json").read_text())
        for name in _NAMES
        if (options.out / f"{name}.json").exists()
    }
    (options.out / "README.md").write_text(report.page(written))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=_NAMES, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--sizes", type=_sizes, help=f"of all_reduce; {_SIZES} by default")
    parser.add_argument("--ranks", type=_numbers, default=[2, 4], help="2,4 by default")
    parser.add_argument("--without-torch", action="store_true", help="measure ferro alone")
    parser.add_argument("--out", type=Path, default=_HERE / "results", help="folder to write to")
    options = parser.parse_args()
    if options.sizes is None:
        options.sizes = _sizes(_QUICK_SIZES if options.quick else _SIZES)
    return options


def _sizes(text: str) -> list[int]:
    return [parse_size(part) for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _collectives(options: argparse.Namespace) -> list[dict[str, object]]:
    cases = [f"all_reduce:{size}" for size in options.sizes]
    cases += [f"{other}:{size}" for other in _OTHERS for size in _sizes(_OTHER_SIZES)]
    arguments = [f"--case={case}" for case in cases]
    arguments += ["--quick"] if options.quick else []
    arguments += ["--without-torch"] if options.without_torch else []
    return [
        {"ranks": ranks} | record
        for ranks in options.ranks
        for record in _started("collectives.py", ranks, arguments)
    ]


def _imports(options: argparse.Namespace) -> list[dict[str, object]]:
    records = imports.measure(3 if options.quick else 21)
    for record in records:
        median, limit = time_text(record["median_s"]), time_text(record["limit_s"])
        print(f"{record['name']}: {median}, limit {limit}", flush=True)
    return records


def _ddp(options: argparse.Namespace) -> list[dict[str, object]]:
    rounds = 2 if options.quick else 8
    given = [f"--rounds={rounds}", *(["--without-torch"] if options.without_torch else [])]
    memory = _started("ddp.py", _DDP_RANKS, ["memory", *given])
    times = _started("ddp.py", _DDP_RANKS, ["times", *given])
    print(f"peak memory of a step: {memory['ratio']:.3f} x what must be there", flush=True)
    for peer in ("ferro", "torch"):
        if peer in times:
            print(f"step, {peer}: {time_text(times[peer]['median_s'])}", flush=True)
    return [memory, times]


def _started(script: str, ranks: int, arguments: list[str]) -> object:
    """Run a script as ranks, its output shown; return what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "result.json"
        launch = [sys.executable, "-m", "ferro", "run", "-n", str(ranks)]
        subprocess.run(
            [*launch, str(_HERE / script), *arguments, f"--out={written}"],
            env=os.environ | _SETTINGS,
            check=True,
            timeout=_DEADLINE_S,
        )
        return json.loads(written.read_text())


if __name__ == "__main__":
    main()
