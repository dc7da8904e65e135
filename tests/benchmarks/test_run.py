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
    kinds = ("--ops=all_reduce,barrier", "--sizes=4,64K", "--ranks=2")
    ended = run_benchmarks(tmp_path, "--only=collectives", *kinds)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "collectives.json").read_text())
    [run] = result["by_ranks"].values()
    assert run["bandwidth_b_s"] > 0
    found = [(r["collective"], r["nbytes"]) for r in run["records"]]
    assert found == [("all_reduce", 4), ("all_reduce", 65536), ("barrier", 0)]
    for record in run["records"]:
        kinds = {"ferro-private", "ferro-private-persistent"}
        assert set(record["results"]) == kinds | ({"ferro-group"} if record["nbytes"] else set())
        for times in record["results"].values():
            assert 0 < times["min_s"] <= times["median_s"]
    page = (tmp_path / "README.md").read_text()
    assert "| 2 ranks | size | ferro private | ferro group | ferro persistent |" in page
    assert "| all_reduce | 64 KiB | " in page
    assert "GB/s" in page


def test_strategies_are_measured_and_reported(tmp_path):
    ended = run_benchmarks(tmp_path, "--only=training", "--only=pipeline")
    assert ended.returncode == 0, ended.stderr
    training = json.loads((tmp_path / "training.json").read_text())
    ddp, fsdp = training["memory"]
    assert fsdp["parts"]["parameters"] == -(-ddp["parts"]["parameters"] // 2)
    [times] = training["times"]
    assert set(times["steps"]) == {"alone", "ddp", "fsdp"}
    assert times["observed"]["alone"]["collectives_s"] == 0 < times["observed"]["fsdp"]["collectives_s"]
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
        "size": 1 << 20,
        "apart": False,
        "measured": "2026-11-29T22:27+00:00",
        "results": {name: {"median_s": t, "min_s": t / 2, "p10_s": t / 2, "p90_s": t} for name, t in times.items()},
    }
    run = {"bandwidth_b_s": 4 * 2**30, "versions": {"ferro": "ferro 1"}, "records": [record]}
    machine = dict.fromkeys(("cpu", "cores", "system", "python", "numpy", "torch", "ferro", "date")) | {"cores": 2}
    page = report.page({"collectives": {"machine": machine, "by_ranks": {"2": run}}})
    lines = page.splitlines()
    assert "| all_reduce | MPI / private | 2.00 |" in lines
    assert "| all_reduce | MPI / group | 4.00 |" in lines
    assert "| all_reduce | torch / private | 5.00 |" in lines
    [head] = [line for line in lines if line.startswith("| 2 ranks | size")]
    [row] = [line for line in lines if line.startswith("| all_reduce | 1 MiB")]
    cells = dict(zip(head.split("|"), row.split("|"), strict=True))
    cells = {name.strip(): text.strip() for name, text in cells.items()}
    assert cells["MPICH"] == "4 ms"
    assert cells["bound / group"] == "98%"  # 2 n S = 4 MiB over 4 GiB/s: 0.98 ms


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
