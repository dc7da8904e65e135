"""`ferro run` when all goes well: what ranks see, and how their output arrives."""

import json
import py_compile
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ferro.rendezvous import StoreServer

from .conftest import TIMEOUT_S, clean_environment, ferro, ferro_command

Script = Callable[[str], Path]
SHOW = "import json; print(json.dumps([dict(os.environ), sys.argv[1:]]))"


def shown(stdout: str) -> list[tuple[dict[str, str], list[str]]]:
    """What each rank printed, in rank order."""
    found = [json.loads(line.partition("] ")[2]) for line in stdout.splitlines()]
    return sorted(found, key=lambda pair: int(pair[0]["RANK"]))


def test_ranks_see_their_place_and_the_job(script: Script) -> None:
    result = ferro("run", "-n", 3, "--timeout-s", 7, script(SHOW), OMP_NUM_THREADS="5")
    assert (result.returncode, result.stderr) == (0, "")
    ranks = [env for env, _ in shown(result.stdout)]
    assert [env["RANK"] for env in ranks] == ["0", "1", "2"]
    assert [env["LOCAL_RANK"] for env in ranks] == ["0", "1", "2"]
    for env in ranks:
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert (env["OMP_NUM_THREADS"], env["FERRO_TIMEOUT_S"]) == ("5", "7.0")
        assert (env["PYTHONUNBUFFERED"], env["FERRO_RESTART"]) == ("1", "0")
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["FERRO_STORE"] != f"127.0.0.1:{env['MASTER_PORT']}"
        assert len(env["FERRO_SECRET"]) == 64
    for name in ("FERRO_STORE", "FERRO_SECRET", "MASTER_PORT"):
        assert len({env[name] for env in ranks}) == 1


def test_a_job_has_a_secret_and_a_store_of_its_own(script: Script) -> None:
    program = script(SHOW)
    results = [ferro("run", "-n", 2, program) for _ in range(2)]
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 2
    first, second = (shown(result.stdout)[0][0] for result in results)
    assert first["FERRO_SECRET"] != second["FERRO_SECRET"]


def test_the_store_is_there(script: Script) -> None:
    program = script("""
        import time
        from ferro.runtime.environment import resolve
        from ferro.rendezvous import StoreClient
        info = resolve()
        with StoreClient(info.store, info.secret, deadline=time.monotonic() + 20) as store:
            store.set(f"{info.rank}", b"here")
            store.get(f"{1 - info.rank}", deadline=time.monotonic() + 20)
        print(info.describe())
        """)
    result = ferro("run", "-n", 2, program)
    assert (result.returncode, result.stderr) == (0, "")
    assert "rank 1 of 2 (from RANK, WORLD_SIZE)" in result.stdout


@pytest.mark.parametrize(
    "outer", ["PMI_RANK=0 PMI_SIZE=1", "SLURM_PROCID=3 SLURM_STEP_ID=0 SLURM_NTASKS=4 SLURM_NNODES=2"]
)
def test_within_another_launcher(script: Script, outer: str) -> None:
    program = script("import ferro.runtime.environment as e; print(e.resolve().launcher)")
    result = ferro("run", "-n", 2, program, **dict(pair.split("=") for pair in outer.split()))
    assert sorted(result.stdout.splitlines()) == ["[0] ferro", "[1] ferro"]
    assert ("each of this step's 4 tasks starts a job of its own" in result.stderr) == ("SLURM" in outer)


def test_arguments_pass_untouched(script: Script) -> None:
    arguments = ["-n", "9", "--", "--log-dir=x", "-h", "a b", "", "--"]
    result = ferro("run", "--nproc-per-node=2", script(SHOW), *arguments)
    assert [argv for _, argv in shown(result.stdout)] == [arguments, arguments]


def test_module(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__main__.py").write_text("import os, sys\n" + SHOW)
    result = ferro("run", "-n", 2, "-m", "pack", "--x", PYTHONPATH=str(tmp_path))
    assert [argv for _, argv in shown(result.stdout)] == [["--x"], ["--x"]]


def test_streams_stay_apart_and_prefixes_align(script: Script) -> None:
    program = script("""
        print("out", rank)
        print("err", rank, file=sys.stderr)
        sys.stdout.write("no end")
        """)
    result = ferro("run", "-n", 11, program)
    assert sorted(result.stdout.splitlines()) == sorted(
        line for r in range(11) for line in (f"[{r:2}] out {r}", f"[{r:2}] no end")
    )
    assert sorted(result.stderr.splitlines()) == sorted(f"[{r:2}] err {r}" for r in range(11))


def test_a_world_of_one_is_passed_through(script: Script) -> None:
    program = script(r"os.write(1, b'50%\r100%\xff\nno end')")
    result = subprocess.run(
        ferro_command("run", program), capture_output=True, env=clean_environment(), timeout=TIMEOUT_S, check=True
    )
    assert result.stdout == b"50%\r100%\xff\nno end"


def test_progress_bars_and_undecodable_bytes(script: Script) -> None:
    program = script(r"""
        if rank == 0:
            os.write(2, b"\r 50%|xx|\r100%|xxxx|\n")
            os.write(1, b"\xff\xfe\r\n")
        """)
    result = subprocess.run(
        ferro_command("run", "-n", "2", program),
        capture_output=True,
        env=clean_environment(),
        timeout=TIMEOUT_S,
        check=True,
    )
    assert result.stderr == b"\r[0]  50%|xx|\r[0] 100%|xxxx|\n"
    assert result.stdout == b"[0] \xff\xfe\r\n"


def test_output_larger_than_any_pipe_arrives_whole(script: Script) -> None:
    program = script(r"""
        sys.stdout.write("x" * 300_000 + "\n")
        for i in range(20_000): print(i)
        """)
    result = ferro("run", "-n", 2, program)
    for rank in "01":
        mine = [line[4:] for line in result.stdout.splitlines() if line.startswith(f"[{rank}]")]
        numbers = [line for line in mine if not line.startswith("x")]
        assert numbers == [str(i) for i in range(20_000)]
        assert sum(map(len, mine[:-20_000])) == 300_000


def test_log_dir(script: Script, tmp_path: Path) -> None:
    logs = tmp_path / "new" / "logs"
    program = script("print('out', rank); print('err', rank, file=sys.stderr)")
    result = ferro("run", "-n", 2, "--log-dir", logs, program)
    assert "[1] out 1" in result.stdout
    assert {path.name: path.read_text() for path in logs.iterdir()} == {
        "rank0.out": "out 0\n",
        "rank0.err": "err 0\n",
        "rank1.out": "out 1\n",
        "rank1.err": "err 1\n",
    }


def test_a_logged_traceback_is_shown_where_the_rank_goes_on(script: Script) -> None:
    program = script("""
        import traceback
        try: raise KeyError("logged")
        except KeyError: traceback.print_exc()
        print("later", file=sys.stderr)
        """)
    result = ferro("run", "-n", 2, program)
    assert result.returncode == 0
    for rank in "01":
        mine = [line for line in result.stderr.splitlines() if line.startswith(f"[{rank}]")]
        assert mine[0] == f"[{rank}] Traceback (most recent call last):"
        assert mine[-2:] == [f"[{rank}] KeyError: 'logged'", f"[{rank}] later"]


def test_a_logged_traceback_is_shown_while_the_rank_runs(script: Script, tmp_path: Path) -> None:
    # The rank ends only when the traceback has been seen.
    seen = tmp_path / "seen"
    program = script(f"""
        import time, traceback
        try: raise KeyError("logged")
        except KeyError: traceback.print_exc()
        deadline = time.monotonic() + 20
        while not os.path.exists({str(seen)!r}):
            if time.monotonic() > deadline: sys.exit(3)
            time.sleep(0.01)
        """)
    process = subprocess.Popen(
        ferro_command("run", "-n", "2", program), stderr=subprocess.PIPE, env=clean_environment(), text=True
    )
    with process:
        assert process.stderr is not None
        assert "Traceback" in process.stderr.readline()
        seen.touch()
        process.stderr.read()
        assert process.wait(TIMEOUT_S) == 0


def test_trace_parts_are_merged(script: Script, tmp_path: Path) -> None:
    program = script("""
        import json, pathlib
        part = {"traceEvents": [{"name": "all_reduce", "pid": rank}]}
        if rank < 2:
            pathlib.Path(os.environ["FERRO_TRACE"], f"rank{rank}.json").write_text(json.dumps(part))
        """)
    target = tmp_path / "out.json"
    result = ferro("run", "-n", 3, "--trace", target, program)
    assert result.returncode == 0
    assert "rank 2 wrote no trace" in result.stderr
    events = json.loads(target.read_text())["traceEvents"]
    assert [event["pid"] for event in events] == [0, 1]
    assert list(tmp_path.glob(".out.json*")) == []


def test_a_reader_that_leaves_ends_the_job(script: Script) -> None:
    program = script("while True: print('y' * 1000)")
    with subprocess.Popen(
        ferro_command("run", "-n", "2", program),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
        assert b"nobody reads the output of the launcher any more (SIGPIPE)" in process.stderr.read()


class TestTwoNodes:
    PROGRAM = "print(os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'], os.environ['FERRO_STORE'])"

    @staticmethod
    def run(*per_node: list[object], secrets: tuple[str, str] = ("5e" * 32, "5e" * 32)) -> list:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        nodes = [
            subprocess.Popen(
                ferro_command("run", "--nnodes", 2, "--node-rank", rank, "--rdzv-endpoint",
                              endpoint, *arguments),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=clean_environment(FERRO_SECRET=secrets[rank]),
                text=True,
            )
            for rank, arguments in enumerate(per_node)
        ]  # fmt: skip
        try:
            return [(*node.communicate(timeout=TIMEOUT_S), node.returncode) for node in nodes]
        finally:
            for node in nodes:
                node.kill()

    def test_ranks_are_numbered_through(self, script: Script) -> None:
        program = script(self.PROGRAM)
        first, second = self.run(["-n", 2, program], ["-n", 2, program])
        lines = sorted((first[0] + second[0]).splitlines())
        assert [line.split()[:3] for line in lines] == [
            ["[0]", "0", "4"],
            ["[1]", "1", "4"],
            ["[2]", "0", "4"],
            ["[3]", "1", "4"],
        ]
        assert len({line.split()[3] for line in lines}) == 1
        assert (first[1:], second[1:]) == (("", 0), ("", 0))

    def test_a_failure_ends_the_other_node_too(self, script: Script) -> None:
        program = script("""
            import time
            if rank == 2: raise ValueError("over here")
            time.sleep(60)
            """)
        first, second = self.run(["-n", 2, program], ["-n", 2, program])
        assert (first[2], second[2]) == (1, 1)
        assert "[2] ValueError: over here" in second[1]
        for result, ended in ((first, "ended ranks 0, 1"), (second, "ended rank 3")):
            assert "ferro run: rank 2 failed first: exit code 1" in result[1]
            assert ended in result[1]

    def test_both_start_again(self, script: Script) -> None:
        program = script("""
            if rank == 1 and os.environ["FERRO_RESTART"] == "0": sys.exit(9)
            print("attempt", os.environ["FERRO_RESTART"], os.environ["FERRO_SECRET"])
            """)
        arguments = ["-n", 1, "--max-restarts", 1, program]
        first, second = self.run(arguments, arguments)
        assert (first[2], second[2]) == (0, 0)
        assert "[0] attempt 1" in first[0]
        assert "[1] attempt 1" in second[0]
        assert "starting all ranks again: restart 1 of 1" in first[1]

    def test_different_sizes_are_refused_on_both(self, script: Script) -> None:
        program = script(self.PROGRAM)
        for out, err, code in self.run(["-n", 2, program], ["-n", 1, program]):
            assert (out, code) == ("", 1)
            assert "--nproc-per-node is 1 on node 1 and 2 on node 0" in err

    def test_an_endpoint_that_is_taken(self, script: Script) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            result = ferro("run", "--nnodes", 2, "--node-rank", 0, "--rdzv-endpoint",
                           f"127.0.0.1:{port}", script(self.PROGRAM),
                           FERRO_SECRET="5e" * 32)  # fmt: skip
        assert result.returncode == 1
        assert str(port) in result.stderr
        assert result.stderr.count("\n") == 1

    def test_another_secret_is_refused(self, script: Script) -> None:
        program = script(self.PROGRAM)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with StoreServer("127.0.0.1", port, secret=b"another secret"):
            result = ferro("run", "--nnodes", 2, "--node-rank", 1, "--rdzv-endpoint",
                           f"127.0.0.1:{port}", program, FERRO_SECRET="5e" * 32)  # fmt: skip
        assert (result.returncode, result.stdout) == (1, "")
        assert "FERRO_SECRET" in result.stderr


def test_the_launcher_leaves_the_ranks_no_open_files(script: Script) -> None:
    result = ferro("run", "-n", 2, script("print(sorted(map(int, os.listdir('/proc/self/fd'))))"))
    # stdin, stdout, stderr, and the directory being listed
    assert set(result.stdout.splitlines()) == {"[0] [0, 1, 2, 3]", "[1] [0, 1, 2, 3]"}


def test_ranks_find_bytecode_and_write_none_where_python_is_told_not_to(script: Script, tmp_path: Path) -> None:
    """The bytecode differs from its source, so that the ranks' output tells which of them they ran."""
    for name in ("compiled", "plain"):
        (tmp_path / f"{name}.py").write_text("VALUE = 'bytecode'")
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(tmp_path / "compiled.py"), invalidation_mode=unchecked, doraise=True)
    (tmp_path / "compiled.py").write_text("VALUE = 'source'")
    before = sorted(tmp_path.rglob("*.pyc"))
    program = script("import compiled, plain; print(compiled.VALUE)")
    result = ferro("run", "-n", 2, program, PYTHONDONTWRITEBYTECODE="1")
    assert sorted(result.stdout.splitlines()) == ["[0] bytecode", "[1] bytecode"]
    assert sorted(tmp_path.rglob("*.pyc")) == before
