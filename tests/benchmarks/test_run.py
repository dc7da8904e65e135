"""The benchmarks run, check what they compute, and write what they promise. No time is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEADLINE_S = 60


def run_benchmarks(folder, *arguments):
    program = [sys.executable, str(BENCHMARKS / "run.py"), "--quick"]
    return subprocess.run([*program, f"--out={folder}", *arguments], capture_output=True, text=True, timeout=DEADLINE_S)


def test_collectives_are_measured_and_reported(tmp_path):
    ended = run_benchmarks(tmp_path, "--only=collectives", "--sizes=4,64K", "--ranks=2")
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "collectives.json").read_text())
    [run] = result["by_ranks"].values()
    assert run["bandwidth_b_s"] > 0
    assert [(r["collective"], r["nbytes"]) for r in run["records"]] == [
        ("all_reduce", 4),
        ("all_reduce", 65536),
        ("all_gather", 65536),
        ("reduce_scatter", 65536),
        ("broadcast", 65536),
        ("all_to_all", 65536),
    ]
    for record in run["records"]:
        assert set(record["results"]) == {"ferro-private", "ferro-group"}
        for times in record["results"].values():
            assert 0 < times["min_s"] <= times["median_s"]
    page = (tmp_path / "README.md").read_text()
    assert "### all_reduce, 2 ranks" in page
    assert "| 64 KiB | " in page
    assert "GB/s" in page


def test_strategies_are_measured_and_reported(tmp_path):
    ended = run_benchmarks(tmp_path, "--only=training", "--only=pipeline")
    assert ended.returncode == 0, ended.stderr
    training = json.loads((tmp_path / "training.json").read_text())
    ddp, fsdp = training["memory"]
    assert fsdp["parts"]["parameters"] == -(-ddp["parts"]["parameters"] // 2)
    [times] = training["times"]
    assert set(times["steps"]) == {"alone", "ddp", "fsdp"}
    assert times["steps"]["alone"]["collectives_s"] == 0 < times["steps"]["fsdp"]["collectives_s"]
    records = json.loads((tmp_path / "pipeline.json").read_text())["records"]
    gpipe = [record for record in records if record["schedule"] == "gpipe"]
    # m = 2: (p - 1) / (m + p - 1)
    assert [r["simulated"]["bubble"] for r in gpipe] == [pytest.approx(1 / 3), pytest.approx(3 / 5)]
    assert all(0 < record["measured"]["bubble"] < 1 for record in records)
    page = (tmp_path / "README.md").read_text()
    assert "| two gathered units |" in page
    assert "| zb_h1 | arithmetic | 2 | 1 | 2 |" in page


def test_the_page_has_a_column_for_every_peer_and_ratio(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    names = ("ferro-private", "ferro-group", "torch-gloo", "openmpi", "mpich")
    times = dict(zip(names, (2e-3, 1e-3, 10e-3, 8e-3, 4e-3), strict=True))
    record = {
        "collective": "all_reduce",
        "ranks": 2,
        "nbytes": 1 << 20,
        "results": {name: {"median_s": t, "min_s": t / 2} for name, t in times.items()},
    }
    run = {"bandwidth_b_s": 4 * 2**30, "versions": {"ferro": "ferro 1"}, "records": [record]}
    machine = dict.fromkeys(("cpu", "cores", "system", "python", "numpy", "torch", "ferro", "date"))
    page = report.page({"collectives": {"machine": machine, "by_ranks": {"2": run}}})
    [head] = [line for line in page.splitlines() if line.startswith("| size")]
    [row] = [line for line in page.splitlines() if line.startswith("| 1 MiB")]
    cells = dict(zip(head.split("|"), row.split("|"), strict=True))
    cells = {name.strip(): text.strip() for name, text in cells.items()}
    assert cells["MPICH"] == "4 ms / 2 ms"
    assert cells["torch / private"] == "5.00"
    assert cells["MPI / private"] == "2.00"
    assert cells["MPI / group"] == "4.00"
    # 2 n S = 4 MiB over 4 GiB/s: 0.98 ms
    assert cells["bound / private"] == "49% / 98%"
    assert cells["bound / group"] == "98% / 195%"


def test_facts_name_versions_but_neither_host_nor_path(tmp_path):
    ended = run_benchmarks(tmp_path, "--only=imports")
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "imports.json").read_text())
    assert set(result["machine"]) == {*("date", "system", "cpu", "cores", "python"), *("ferro", "numpy", "torch")}
    assert [r["limit_s"] for r in result["records"]] == [0.03, 0.05]


def test_a_wrong_size_is_refused(tmp_path):
    ended = run_benchmarks(tmp_path, "--sizes=64X")
    assert ended.returncode == 2
    assert "--sizes" in ended.stderr


def test_a_wrong_peer_is_refused(tmp_path):
    ended = run_benchmarks(tmp_path, "--compare=smoke-signals")
    assert ended.returncode == 2
    assert "--compare" in ended.stderr
