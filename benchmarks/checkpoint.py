"""Measure checkpoints beside torch.distributed.checkpoint and the raw disk; print tables, write JSON and a chart.

    python benchmarks/checkpoint.py --folder DIR             ten minutes; DIR is on the disk that is measured
    python benchmarks/checkpoint.py --folder DIR --quick     a minute
    python benchmarks/checkpoint.py --folder DIR --only disk,training

It needs 3.1 GiB of disk at a time, and 12 GiB of memory. `run.py` runs it as well, with its own folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint_chart
import report_checkpoint
from records import Record, machine_facts

_HERE = Path(__file__).resolve().parent
_DEADLINE_S = 900.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
RESHARDED = ((4, 3), (2, 5), (1, 4))


class Ranks:
    """Runs the programs of ranks in a folder of its own, which is removed.

    Args:
        folder: on the disk that is measured; the system's for temporary files if None.
        quick: a fraction of the bytes, and few turns.
        with_torch: whether torch takes part.
    """

    def __init__(self, folder: Path | None, *, quick: bool, with_torch: bool) -> None:
        self.quick, self.with_torch = quick, with_torch
        self._parent = folder

    def run(self, count: int, script: str, *arguments: str, folder: Path | None = None) -> list[Record]:
        """Run a script as `count` ranks; return the records that rank 0 wrote."""
        with tempfile.TemporaryDirectory(dir=self._parent, prefix="ferro-bench-") as own:
            written = Path(own) / "result.json"
            subprocess.run(
                [
                    *(sys.executable, "-m", "ferro", "run", "-n", str(count), str(_HERE / script), *arguments),
                    *(f"--folder={folder or own}", f"--out={written}"),
                ],
                env=os.environ | _ENVIRONMENT,
                check=True,
                timeout=_DEADLINE_S,
            )
            return json.loads(written.read_text())["records"]

    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """Make a folder for several runs."""
        return tempfile.TemporaryDirectory(dir=self._parent, prefix="ferro-bench-")

    @property
    def torch_option(self) -> list[str]:
        """The option of programs in which torch may take part."""
        return [] if self.with_torch else ["--without-torch"]


def _disk(ranks: Ranks) -> list[Record]:
    sizes = ["--layers=4", "--turns=2"] if ranks.quick else ["--layers=64", "--turns=5"]
    records = ranks.run(1, "checkpoint_disk.py", "--layouts=replicated", *sizes, *ranks.torch_option)
    for count in (2,) if ranks.quick else (2, 4):
        records += ranks.run(count, "checkpoint_disk.py", "--layouts=shards,replicated", *sizes, *ranks.torch_option)
    return records


def _training(ranks: Ranks) -> list[Record]:
    sizes = ["--widths=784,1024*3,10", "--batch=64", "--turns=2"] if ranks.quick else ["--turns=5"]
    return [
        *ranks.run(1, "checkpoint_training.py", "--strategies=alone", *sizes, *ranks.torch_option),
        *ranks.run(2, "checkpoint_training.py", "--strategies=ddp,fsdp", *sizes, *ranks.torch_option),
    ]


def _resharding(ranks: Ranks) -> list[Record]:
    records = []
    for saved, loaded in RESHARDED:
        with ranks.folder() as folder:
            sizes = f"--layers={4 if ranks.quick else 16}"
            ranks.run(saved, "checkpoint_reshard.py", "save", sizes, *ranks.torch_option, folder=Path(folder))
            found = ranks.run(loaded, "checkpoint_reshard.py", "load", sizes, *ranks.torch_option, folder=Path(folder))
            records += [{"from": saved, **record} for record in found]
    return records


def _planning(ranks: Ranks) -> list[Record]:
    sizes = ["--planned=10000", "--opened=1000", "--turns=2"] if ranks.quick else ["--turns=5"]
    records = ranks.run(1, "checkpoint_plan.py", *sizes, *ranks.torch_option)
    return records + ranks.run(2, "checkpoint_plan.py", *sizes, "--without-torch")


def _memory(ranks: Ranks) -> list[Record]:
    return ranks.run(3, "checkpoint_neighbour.py", *(["--layers=4", "--turns=2"] if ranks.quick else ["--layers=64"]))


PARTS: dict[str, Callable[[Ranks], list[Record]]] = {
    "disk": _disk,
    "training": _training,
    "resharding": _resharding,
    "planning": _planning,
    "memory": _memory,
}


def measure(ranks: Ranks, out: Path, only: list[str] | None = None) -> dict[str, object]:
    """Measure all parts, or some of them; print their tables, and return all that is known with what was known.

    Args:
        ranks: how to run the ranks.
        out: the folder of results, where the chart is drawn, and from which parts that are left out are taken.
        only: the names of parts.
    """
    written = out / "checkpoint.json"
    result = json.loads(written.read_text()) if only and written.exists() else {}
    for name in only or PARTS:
        start = time.monotonic()
        result[name] = PARTS[name](ranks)
        print(*report_checkpoint.tables({name: result[name]}), sep="\n\n")
        print(f"\n({name}: {time.monotonic() - start:.0f} s)\n", flush=True)
    if importlib.util.find_spec("matplotlib") is not None:
        checkpoint_chart.draw(result, out / "checkpoint.png")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=lambda text: text.split(","), help=f"parts: {','.join(PARTS)}")
    add("--quick", action="store_true", help="a fraction of the bytes, and few turns")
    add("--without-torch", action="store_true", help="ferro and the raw disk alone")
    add("--folder", type=Path, help="on the disk to measure; the system's folder for temporary files by default")
    add("--out", type=Path, help="folder of results; benchmarks/results, or benchmarks/results-quick")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    out = options.out or _HERE / ("results-quick" if options.quick else "results")
    out.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(options.folder, quick=options.quick, with_torch=not options.without_torch)
    result = measure(ranks, out, options.only)
    (out / "checkpoint.json").write_text(json.dumps({"machine": machine_facts(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
