"""Compare the parameters that every strategy trains with those of one process; write JSON.

    python benchmarks/parity.py --out parity.json               processes over gloo: half a minute
    python benchmarks/parity.py --simulate --ranks 2,3          threads: a few seconds

A parameters' difference is the largest of any element of any parameter (and running statistic) on
any rank, over the largest element of the model. A loss's difference is relative to the loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from parity_models import STEPS, LossAndState
from parity_rank import COMBINED_RANKS, strategies, train_all
from records import Record, integers, machine_facts, markdown_table

import ferro
from ferro_testing import run_ranks

RANKS = (1, 2, 3, 4, COMBINED_RANKS)
METHOD = """\
Small models are trained for a few steps under every strategy and in one process. Each cell has the
largest difference of any element of any parameter (and running statistic) on any rank, relative to
the largest element of the model, and after the stroke that of the last loss. "fsdp x sp x pp" is 2
shards x 2 shards of matrices and sequences x 2 stages. With bfloat16 the computation is in bfloat16
and the master shards are in float32; the one process does the same (FSDP on one rank)."""
_HERE = Path(__file__).resolve().parent
_DEADLINE_S = 120.0


def measure(ranks: Sequence[int], *, simulate: bool) -> dict[str, object]:
    """Measure the differences; return a record for each strategy, dtype and number of ranks.

    Args:
        ranks: numbers of ranks; strategies are combined on 8 ranks, and separate on others.
        simulate: run ranks as threads; otherwise as processes over gloo.

    Raises:
        ValueError: a strategy returned other arrays than one process, or a number is not finite.
    """
    records = []
    for count in ranks:
        results = _results(count, simulate=simulate)
        for name, strategy in strategies(count).items():
            for dtype in strategy.dtypes:
                per_rank = [result[name][dtype] for result in results]
                expected = strategy.in_one_process(dtype)
                difference = _difference(f"{name}, {dtype}", per_rank, expected)
                records.append({"strategy": name, "dtype": dtype, "ranks": count, **difference})
    by = "simulated ranks" if simulate else "gloo"
    return {"machine": machine_facts(), "steps": STEPS, "by": by, "records": records}


def table(record: Record) -> str:
    """Return the differences as a Markdown table: the parameters' / the loss's."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in record["records"]:
        of_ranks = cells.setdefault((row["strategy"], row["dtype"]), {})
        of_ranks[row["ranks"]] = f"{row['parameters']:.1e} / {row['loss']:.1e}"
    ranks = sorted({row["ranks"] for row in record["records"]})
    heads = ["strategy", "dtype", *(f"{count} rank{'s' * (count > 1)}" for count in ranks)]
    return markdown_table(
        heads, [[*labels, *(by_ranks.get(count, "") for count in ranks)] for labels, by_ranks in cells.items()]
    )


def _results(ranks: int, *, simulate: bool) -> list[dict[str, dict[str, LossAndState]]]:
    if simulate:
        return ferro.simulate(train_all, ranks, timeout_s=_DEADLINE_S, run_timeout_s=_DEADLINE_S)
    settings = {"PYTHONPATH": str(_HERE), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return run_ranks(train_all, ranks, backend="gloo", timeout_s=_DEADLINE_S, env=settings)


def _difference(label: str, results: Sequence[LossAndState], expected: LossAndState) -> dict[str, float]:
    """Return the largest relative differences of any rank."""
    expected_loss, expected_state = expected
    names = {name for _, state in results for name in state}
    if names != expected_state.keys():
        odd = sorted(names ^ expected_state.keys())
        raise ValueError(f"{label}: arrays {odd} are on one side only")
    scale = max(float(np.abs(array).max()) for array in expected_state.values())
    differences = [np.abs(state[name] - expected_state[name]).max() for _, state in results for name in state]
    losses = [abs(loss - expected_loss) for loss, _ in results]
    # np.max returns NaN if any element is NaN; Python's max may not.
    largest = {"parameters": float(np.max(differences)) / scale, "loss": float(np.max(losses)) / abs(expected_loss)}
    if not all(map(np.isfinite, largest.values())):
        raise ValueError(f"{label}: differences {largest} are not finite")
    return largest


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=integers, default=RANKS, help=f"{','.join(map(str, RANKS))} by default")
    add("--simulate", action="store_true", help="ranks are threads, not processes over gloo")
    add("--out", type=Path, required=True, help="file to write")
    return parser.parse_args()


def main() -> None:
    options = _options()
    record = measure(options.ranks, simulate=options.simulate)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
