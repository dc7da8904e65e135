"""The programs in benchmarks/: a part of the comparison is run and written, and the page and the picture of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
DEADLINE_S = 120


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def record(collective, size, *, apart=False, ranks=2, **median_us):
    results = {
        name.replace("_", "-"): {"median_s": us / 1e6, "p10_s": us / 2e6, "p90_s": us / 1e6}
        for name, us in median_us.items()
    }
    about = {"collective": collective, "size": size, "nbytes": size, "ranks": ranks, "apart": apart}
    return {**about, "measured": "2026-01-01T00:00+00:00", "results": results}


def run_of(*records):
    return {"records": list(records), "versions": {"ferro": "ferro 1"}, "bandwidth_b_s": 1e10}


ALL_REDUCE = record(
    "all_reduce", 4, ferro_private=2, ferro_group=5, ferro_private_persistent=1, torch_gloo=90,
    openmpi=3, openmpi_persistent=2, mpich=2.5, mpich_persistent=5,
)  # fmt: skip
BARRIER = record("barrier", 0, ferro_private=2, ferro_private_persistent=2, openmpi=1, openmpi_persistent=3)


def test_a_ratio_is_the_quickest_mpi_over_ferro_and_persistent_ones_count_for_persistent_ones():
    import ratios

    found = {column.name: column.ratio(ALL_REDUCE) for column in ratios.COLUMNS}
    assert found == pytest.approx(
        {"MPI / private": 1.25, "MPI / group": 0.5, "MPI / persistent": 2.0, "torch / private": 45.0}
    )
    assert [column.ratio(BARRIER) for column in ratios.COLUMNS] == [0.5, None, 0.5, None]


def test_the_page_names_the_cells_in_which_ferro_is_slower():
    import report_collectives

    runs = {"2": run_of(ALL_REDUCE, BARRIER)}
    private, group, persistent, torch = report_collectives.summary(runs)
    assert private == "MPI / private: 1 of 2 cells are 1 or more. Below: barrier of 2: 0.50"
    assert group == "MPI / group: 0 of 1 cells are 1 or more. Below: all_reduce of 2: 4 B 0.50"
    assert persistent.endswith("Below: barrier of 2: 0.50")
    assert torch.endswith("1 of 1 cells are 1 or more. Below: none")
    page = "\n".join(report_collectives.tables({"by_ranks": runs, "machine": {"cores": 2}}))
    assert "| all_reduce | MPI / private | 1.25 |" in page
    assert "| barrier | MPI / persistent | 0.50 |" in page


def test_a_part_that_is_measured_anew_leaves_the_other_cells():
    import collectives

    earlier = run_of(ALL_REDUCE, record("broadcast", 4, ferro_private=7), record("broadcast", 4, apart=True))
    now = run_of(record("broadcast", 4, ferro_private=1), record("all_reduce", 16))
    merged = collectives.merged(earlier, now)
    places = [(one["collective"], one["apart"], one["size"]) for one in merged["records"]]
    assert places == [
        ("all_reduce", False, 4), ("all_reduce", False, 16), ("broadcast", False, 4), ("broadcast", True, 4)
    ]  # fmt: skip
    assert merged["records"][2]["results"]["ferro-private"]["median_s"] == 1e-6


def test_overhead_is_that_over_the_same_librarys_own_step():
    import report_strategies

    seconds = {"alone": 2.0, "ddp": 2.2, "torch-alone": 1.0, "torch-ddp": 1.5}
    steps = {name: {"median_s": value} for name, value in seconds.items()}
    found = {name: report_strategies.overhead_text(name, steps) for name in steps}
    assert found == {"alone": "", "ddp": "10%", "torch-alone": "", "torch-ddp": "50%"}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_heat_map_is_drawn(tmp_path):
    import heatmap

    target = tmp_path / "heatmap.png"
    heatmap.draw({"2": run_of(ALL_REDUCE, BARRIER), "8": run_of(ALL_REDUCE)}, target)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_part_of_the_comparison_runs_and_is_written(tmp_path):
    part = ["--only=collectives", "--quick", "--ranks=2", "--ops=all_reduce,reduce,barrier", "--sizes=4B,1KiB"]
    ended = subprocess.run(
        [sys.executable, FOLDER / "run.py", *part, f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    run = json.loads((tmp_path / "collectives.json").read_text())["by_ranks"]["2"]
    places = [(one["collective"], one["apart"], one["size"]) for one in run["records"]]
    both = [
        (name, apart, size) for name, apart in (("all_reduce", 0), ("reduce", 0), ("reduce", 1)) for size in (4, 1024)
    ]
    assert places == [*both, ("barrier", False, 0)]
    assert set(run["records"][0]["results"]) == {"ferro-private", "ferro-group", "ferro-private-persistent"}
    assert "### Times" in (tmp_path / "README.md").read_text()
