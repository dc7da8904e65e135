"""Compare what every strategy trains with what one process trains; write JSON.

    python benchmarks/parity.py --out parity.json               processes over gloo: half a minute
    python benchmarks/parity.py --simulate --ranks 2,3          threads: a few seconds

The difference is the largest of any element of any parameter (and running statistic) on any rank,
over the largest element of the model; and that of the loss over the loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import machine
import markdown
import numpy as np
from parity_models import STEPS, Found
from parity_rank import TOGETHER_RANKS, strategies, train_all

import ferro
from ferro_testing import run_ranks

# What was read from JSON: numbers, words, and records and lists of them.
Record: TypeAlias = Mapping[str, object]

RANKS = (1, 2, 3, 4, TOGETHER_RANKS)
HOW = """\
Small models, trained for a few steps under every strategy and in one process. The largest
difference of any element of any parameter (and running statistic) on any rank, relative to the
largest element of the model, and after the stroke that of the last loss. "fsdp x sp x pp" is 2
shards x 2 pieces of matrices and sequences x 2 stages. bfloat16 is that of the computation, over
float32 master shards; the one process computes in it, too (FSDP on one rank)."""
_HERE = Path(__file__).resolve().parent
_DEADLINE_S = 120.0


def measure(ranks: Sequence[int], *, simulate: bool) -> dict[str, object]:
    """Return the differences, a record for each strategy, dtype and number of ranks.

    Args:
        ranks: numbers of ranks; on 8 strategies are combined, on others they are alone.
        simulate: run ranks as threads; otherwise as processes over gloo.

    Raises:
        ValueError: a strategy gave other arrays than one process, or no finite ones.
    """
    records = []
    for count in ranks:
        results = _results(count, simulate=simulate)
        for name, strategy in strategies(count).items():
            for dtype in strategy.dtypes:
                found = [result[name][dtype] for result in results]
                difference = _difference(f"{name}, {dtype}", found, strategy.alone(dtype))
                records.append({"strategy": name, "dtype": dtype, "ranks": count, **difference})
    by = "simulated ranks" if simulate else "gloo"
    return {"machine": machine.facts(), "steps": STEPS, "by": by, "records": records}


def table(record: Record) -> str:
    """Return the differences in Markdown: parameters' and, after the stroke, the loss's."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in record["records"]:
        of_ranks = cells.setdefault((row["strategy"], row["dtype"]), {})
        of_ranks[row["ranks"]] = f"{row['parameters']:.1e} / {row['loss']:.1e}"
    ranks = sorted({row["ranks"] for row in record["records"]})
    heads = ["strategy", "dtype", *(f"{count} rank{'s' * (count > 1)}" for count in ranks)]
    return markdown.table(
        heads,
        [
            [*which, *(by_ranks.get(count, "") for count in ranks)]
            for which, by_ranks in cells.items()
        ],
    )


def _results(ranks: int, *, simulate: bool) -> list[dict[str, dict[str, Found]]]:
    if simulate:
        return ferro.simulate(train_all, ranks, timeout_s=_DEADLINE_S, run_timeout_s=_DEADLINE_S)
    settings = {"PYTHONPATH": str(_HERE), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return run_ranks(train_all, ranks, backend="gloo", timeout_s=_DEADLINE_S, env=settings)


def _difference(what: str, results: Sequence[Found], alone: Found) -> dict[str, float]:
    """Return the largest relative differences of any rank."""
    loss, expected = alone
    names = {name for _, state in results for name in state}
    if names != expected.keys():
        raise ValueError(f"{what}: arrays {sorted(names ^ expected.keys())} are on one side only")
    scale = max(float(np.abs(array).max()) for array in expected.values())
    apart = [np.abs(state[name] - expected[name]).max() for _, state in results for name in state]
    losses = [abs(other - loss) for other, _ in results]
    # Not Python's max, which may pass over what is not a number.
    found = {
        "parameters": float(np.max(apart)) / scale,
        "loss": float(np.max(losses)) / abs(loss),
    }
    if not all(map(np.isfinite, found.values())):
        raise ValueError(f"{what}: differences {found} are not finite")
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=_numbers, default=RANKS, help=f"{','.join(map(str, RANKS))} by default")
    add("--simulate", action="store_true", help="ranks are threads, not processes over gloo")
    add("--out", type=Path, required=True, help="file to write")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    options = _options()
    record = measure(options.ranks, simulate=options.simulate)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
