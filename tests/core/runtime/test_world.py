"""ferro.init between real processes: how ranks meet, and what they say when they do not fit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

import ferro
from ferro.rendezvous import StoreServer

SECRET = bytes(range(32))
LIMIT_S = 60
AGAIN = """
import sys, time
import ferro
for turn in range(3):
    time.sleep(0.1 if sys.argv[1] == "0" else 0)  # rank 0, which hosts the store, comes later
    with ferro.init(timeout_s=20) as group:
        assert group.all_reduce(float(turn)) == 2 * turn
print("ok")
"""
FORKING = """
import os, signal, sys, threading
import ferro
group = ferro.init(timeout_s=20)
world = ferro.runtime.lifecycle._world
store, server = world._job_store.store, world._job_store.server

def leave(how):
    with group:
        if how == "use":
            for call in (lambda: group.all_reduce(1.0), lambda: store.add("n", 1)):
                try:
                    call()
                except ferro.UsageError as error:
                    print(error, flush=True)
            with ferro.init(rank=0, world_size=1) as own:
                assert own.all_reduce(1.0) == 1.0
        if how == "exit":
            sys.exit(3)
        if how == "raise":
            raise ValueError(how)
        if how == "close":
            group.close(), group.abort(), group.abandon(), ferro.shutdown(), store.close()
            server and server.close()

for how in ("use", "exit", "return", "raise", "close"):
    # Whatever another thread holds at this moment is held for ever in the child.
    held = [ferro.runtime.lifecycle._lock, store._changed, store._liveness_lock, group._dispatcher._lock]
    if server:
        held.append(server._close_lock)
    ready, done = threading.Event(), threading.Event()
    def hold():
        for lock in held:
            lock.acquire()
        ready.set(), done.wait()
        for lock in held:
            lock.release()
    thread = threading.Thread(target=hold)
    thread.start(), ready.wait()
    child = os.fork()
    if not child:
        signal.alarm(30)
        sys.stderr = open(os.devnull, "w")
        leave(how)
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.set(), thread.join()
    assert status == {"exit": 3, "raise": 1}.get(how, 0), (how, status)
    assert group.all_reduce(1.0) == 2.0, how
    assert group.subgroup([0, 1]).all_reduce(1.0) == 2.0, how
    assert store.add(f"after {how}", 1) <= 2
ferro.shutdown()
print("ok")
"""
ORPHAN = """
import os, signal, sys, time
import ferro
group = ferro.init(timeout_s=50)
store = ferro.runtime.lifecycle._world._job_store.store
seen = os.path.join(os.environ["HOME"], "seen")
group.barrier()
if group.rank == 0:
    if not os.fork():
        signal.alarm(60)
        os.close(1), os.close(2)
        while not os.path.exists(seen):
            time.sleep(0.01)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    store.get("never", deadline=time.monotonic() + 50)
except ferro.FerroError as error:
    print(type(error).__name__, error.peer, error)
open(seen, "w").close()
"""
PASTS = """
import os, signal, sys, time
import ferro
who = sys.argv[1]
def await_file(name):
    deadline = time.monotonic() + 60
    while not os.path.exists(os.path.join(os.environ["HOME"], name)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
def make_file(name):
    open(os.path.join(os.environ["HOME"], name), "w").close()
if who == "0":
    with ferro.init(rank=0, world_size=1) as alone:  # a world of its own before
        alone.subgroup([0])
    for _ in range(2):  # two attempts that fail
        try:
            ferro.init(timeout_s=0.2)
        except ferro.RendezvousError as error:
            assert "still misses ranks [1] of 2" in str(error), error
    make_file("failed")
await_file("failed")
if who == "replacement":
    await_file("died")
else:
    group = ferro.init(timeout_s=40)
    group.subgroup([0, 1]).barrier()
    if who == "1":
        make_file("died")
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        group.all_reduce(1.0)
    except ferro.PeerLost:
        ferro.shutdown()
with ferro.init(timeout_s=40) as group:
    assert group.all_reduce(1.0) == 2.0
    assert group.subgroup([0, 1]).all_reduce(1.0) == 2.0
print("ok")
"""
HELPER = """
import subprocess, sys
import ferro
helper = (
    "import ferro, multiprocessing\\ntry: ferro.init(timeout_s=20)\\nexcept ferro.UsageError as error: print(error)"
    "\\nwith ferro.init(rank=0, world_size=1) as alone: print(alone.all_reduce(1.0))")
def help():
    if sys.argv[1] == "1":
        print(subprocess.run([sys.executable, "-c", helper], capture_output=True, text=True).stdout)
help()
with ferro.init(timeout_s=40) as group:
    help()
    assert group.all_reduce(1.0) == 2.0
    group.barrier()
print("ok")
"""
PROGRAM = """
import json, sys
import ferro
arguments = json.loads(sys.argv[1])
try:
    with ferro.init(**arguments) as group:
        result = ["ok", float(group.all_reduce(1.0)), group.rank, group.backend_name]
except ferro.FerroError as error:
    result = [type(error).__name__, str(error)]
print(json.dumps(result))
"""
LEAVING = """
import json, sys
import ferro
how = json.loads(sys.argv[1])["how"]
group = ferro.init(timeout_s=20)
print(float(group.all_reduce(1.0)), flush=True)
if how == "uncaught":
    raise ValueError(how)
with group:
    if how == "with":
        raise ValueError(how)
"""
LAUNCHERS = ("RANK", "WORLD", "LOCAL", "MASTER", "FERRO", "OMPI", "PMI", "SLURM", "PET", "TORCHELASTIC")


@pytest.fixture
def store():
    with StoreServer(secret=SECRET) as server:
        yield server


@pytest.fixture
def ranks(tmp_path):
    """Start one process for each (variables, arguments of init); return what each printed."""
    program = tmp_path / "program.py"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    clean["HOME"] = str(tmp_path)

    def run(*places, source=PROGRAM, read=json.loads):
        program.write_text(source)
        started = [
            subprocess.Popen(
                [sys.executable, program, arguments_of(arguments)],
                env=clean | {name: str(value) for name, value in variables.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for variables, arguments in places
        ]
        try:
            ended = [process.communicate(timeout=LIMIT_S) for process in started]
        finally:
            for process in started:
                process.kill()
        for process, (output, errors) in zip(started, ended, strict=True):
            assert output or process.returncode == -signal.SIGKILL, errors
        return [read(output) for output, _ in ended]

    return run


def arguments_of(arguments):
    """Return a program's argument: init's as JSON, or just the rank or role."""
    if isinstance(arguments, int | str):
        return str(arguments)
    return json.dumps({"timeout_s": 10, **arguments})


def place(store, rank, size, **others):
    host, port = store.address
    return {"RANK": rank, "WORLD_SIZE": size, "FERRO_STORE": f"{host}:{port}", "FERRO_SECRET": SECRET.hex(), **others}


def of_one_host(tmp_path, size=2):
    """As under torchrun on one host, where rank 0 hosts the store."""
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": str(tmp_path)}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 1, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return [({**shared, "RANK": rank, "LOCAL_RANK": rank}, rank) for rank in range(size)]


def test_alone_it_is_a_world_of_one(ranks):
    assert ranks(({}, {})) == [["ok", 1.0, 0, "gloo"]]


def test_through_a_store_that_runs_already(ranks, store):
    results = ranks(*((place(store, rank, 3), {}) for rank in range(3)))
    assert results == [["ok", 3.0, rank, "gloo"] for rank in range(3)]


def test_rank_zero_hosts_the_store_where_it_is_told(ranks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"rendezvous": f"127.0.0.1:{port}", "world_size": 2}
    results = ranks(*(({}, {**where, "rank": rank}) for rank in range(2)))
    assert results == [["ok", 2.0, rank, "gloo"] for rank in range(2)]


def test_ranks_of_one_host_meet_without_being_told_where(ranks, tmp_path):
    """As under torchrun, which says where its own store is and gives no secret."""
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": str(tmp_path)}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    results = ranks(*(({**shared, "RANK": rank, "LOCAL_RANK": rank}, {}) for rank in range(2)))
    assert results == [["ok", 2.0, rank, "gloo"] for rank in range(2)]


def test_a_rank_that_is_there_twice(ranks, store):
    results = ranks((place(store, 0, 2), {}), (place(store, 0, 2), {}))
    for kind, text in results:
        assert kind == "RendezvousError"
        assert "rank 0 is there twice: pid " in text


def test_ranks_that_differ_in_world_size(ranks, store):
    results = ranks((place(store, 0, 2), {}), (place(store, 1, 3), {}))
    for kind, text in results:
        assert kind == "RendezvousError"
        assert "ranks differ in world size" in text
        assert "rank 1 (host " in text


def test_ranks_that_differ_in_backend(ranks, store):
    results = ranks((place(store, 0, 2), {}), (place(store, 1, 2), {"backend": "simulated"}))
    for kind, text in results:
        assert kind == "RendezvousError"
        assert "ranks differ in the backend" in text
        assert "'simulated'" in text


def test_ranks_that_differ_in_plugins(ranks, store, tmp_path):
    extra = tmp_path / "site"
    (extra / "more-1.0.dist-info").mkdir(parents=True)
    (extra / "more-1.0.dist-info" / "METADATA").write_text("Name: more\nVersion: 1.0\n")
    (extra / "more-1.0.dist-info" / "entry_points.txt").write_text("[ferro]\nmore = more_plugin\n")
    (extra / "more_plugin.py").write_text(textwrap.dedent('"""Offers nothing."""'))
    other = place(store, 1, 2, PYTHONPATH=extra)
    for kind, text in ranks((place(store, 0, 2), {}), (other, {})):
        assert kind == "RendezvousError"
        assert "ranks differ in their plugins" in text
        assert "more from more 1.0" in text


def test_ranks_that_differ_in_determinism(ranks, store):
    results = ranks((place(store, 0, 2), {"deterministic": True}), (place(store, 1, 2), {}))
    for kind, text in results:
        assert kind == "RendezvousError"
        assert "deterministic=True" in text


def test_a_backend_that_is_not_installed(ranks, store):
    results = ranks((place(store, 0, 2), {}), (place(store, 1, 2), {"backend": "carrier-pigeon"}))
    assert results[0][0] == "RendezvousError"
    assert "rank 1 (host " in results[0][1]
    assert results[1][0] == "BackendUnavailable"
    assert "no plugin that offers it is installed (installed: gloo" in results[1][1]


@pytest.mark.parametrize("secret", ["ff" * 32, None], ids=["wrong", "absent"])
def test_a_secret_that_is_wrong_or_absent(ranks, store, secret):
    variables = place(store, 0, 2)
    if secret is None:
        del variables["FERRO_SECRET"]
    else:
        variables["FERRO_SECRET"] = secret
    [(kind, text)] = ranks((variables, {}))
    assert kind == "AuthenticationError"
    assert "do not hold the same secret" in text
    assert "FERRO_SECRET" in text


def test_a_store_that_cannot_be_reached(ranks, store):
    store.close()
    [(kind, text)] = ranks((place(store, 0, 2), {"timeout_s": 0.5}))
    assert kind == "RendezvousError"
    host, port = store.address
    assert f"tried {host}:{port} for 0." in text
    assert "pid " in text


def test_a_rank_that_never_comes(ranks, store):
    places = [(place(store, rank, 3), {"timeout_s": 5}) for rank in range(2)]
    for kind, text in ranks(*places):
        assert kind == "RendezvousError"
        assert "still misses ranks [2] of 3 (present: [" in text


def test_a_port_in_use(ranks):
    with socket.socket() as occupier:
        occupier.bind(("127.0.0.1", 0))
        occupier.listen()
        port = occupier.getsockname()[1]
        arguments = {"rendezvous": f"127.0.0.1:{port}", "rank": 0, "world_size": 2}
        [(kind, text)] = ranks(({}, arguments))
    assert kind == "RendezvousError"
    assert f"cannot listen on 127.0.0.1:{port}" in text


def test_a_port_in_use_that_the_environment_names(ranks, store):
    place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    [(kind, text)] = ranks(({**place, "MASTER_PORT": store.address[1]}, {"timeout_s": 2}))
    assert kind == "RendezvousError"
    assert f"cannot listen on 127.0.0.1:{store.address[1]}" in text


def test_rank_zero_of_this_host_never_comes(ranks, tmp_path):
    place = {"PMI_RANK": 1, "PMI_SIZE": 2, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2}
    place["PMI_JOBID"] = str(tmp_path)
    [(kind, text)] = ranks((place, {"timeout_s": 0.5}))
    assert kind == "RendezvousError"
    assert "rank 1 of 2 (from PMI_RANK, PMI_SIZE)" in text
    assert "for rank 0 to start its store" in text


def test_an_observer_that_is_none_is_refused():
    with pytest.raises(ferro.UsageError, match="3, which is no observer: it has no started, finished"):
        ferro.init(observers=[3])


def test_several_hosts_need_to_be_told_where_to_meet(ranks):
    variables = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    [(kind, text)] = ranks((variables, {}))
    assert kind == "UsageError"
    assert "Set MASTER_ADDR and MASTER_PORT" in text
    assert "from RANK" in text


def test_meeting_again_and_again_where_rank_zero_hosts_the_store(ranks, tmp_path):
    assert ranks(*of_one_host(tmp_path), source=AGAIN, read=str.strip) == ["ok", "ok"]


@pytest.mark.parametrize("hosted", [True, False])
def test_processes_with_different_pasts_meet(ranks, store, tmp_path, hosted):
    """One was alone, and tried in vain, and lost the other, whose replacement is in its first world."""
    first, second = [variables for variables, _ in of_one_host(tmp_path)]
    if not hosted:
        first, second = (place(store, rank, 2) for rank in range(2))
    places = [(first, "0"), (second, "1"), (second, "replacement")]
    assert ranks(*places, source=PASTS, read=str.strip) == ["ok", "", "ok"]


def test_a_program_that_a_rank_starts_does_not_take_its_place(ranks, store):
    places = [(place(store, rank, 2), rank) for rank in range(2)]
    first, second = ranks(*places, source=HELPER, read=str)
    assert first == "ok\n"
    assert second.count("has inherited the variables of rank 1 of 2 (from RANK, WORLD_SIZE)") == 2
    assert second.count("ferro.init(rank=0, world_size=1) here") == 2
    assert second.count("\n1.0\n") == 2
    assert second.endswith("ok\n")


def test_a_program_that_starts_a_rank_is_not_the_rank(ranks, store):
    source = f"import subprocess, sys\nsys.exit(subprocess.call([sys.executable, '-c', {PROGRAM!r}, sys.argv[1]]))"
    results = ranks(*((place(store, rank, 2), {}) for rank in range(2)), source=source)
    assert results == [["ok", 2.0, rank, "gloo"] for rank in range(2)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_leaves_its_parents_world_alone_however_it_ends(ranks, tmp_path):
    for output in ranks(*of_one_host(tmp_path), source=FORKING, read=str):
        assert output.count("this process was forked from process") == 2
        assert output.endswith("ok\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_death_of_the_rank_that_hosts_the_store_is_noticed_though_its_forked_worker_lives_on(ranks, tmp_path):
    _, told = ranks(*of_one_host(tmp_path), source=ORPHAN, read=str)
    assert told.startswith("StoreGone 0 the store at 127.0.0.1:")
    assert "rank 0, which hosts it, has ended: read its log first" in told


def test_determinism_refuses_an_algorithm_that_reduces_in_another_order():
    with pytest.raises(ferro.UsageError, match="in order of rank, which the algorithm 'ring'"):
        ferro.init(deterministic=True, algorithms={"all_reduce": "ring"})


@pytest.mark.parametrize(("how", "lost"), [("well", None), ("with", b"1 "), ("uncaught", b"1 ")])
def test_who_leaves_by_an_exception_is_lost(ranks, store, how, lost):
    """To the others it is as one that died: a library that never notices asks for these."""
    places = [(place(store, 0, 2), {"how": "well"}), (place(store, 1, 2), {"how": how})]
    assert ranks(*places, source=LEAVING) == [2.0, 2.0]
    deadline = time.monotonic() + 20
    while len(store._connections):  # until the server's thread has seen all connections end
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert store._table.get(b"world0/lost") == lost


def test_init_again_after_shutdown(ranks, tmp_path):
    first = ferro.init()
    assert ferro.init() is first
    with pytest.raises(ferro.UsageError, match="was called before in this process with other arguments"):
        ferro.init(deterministic=True)
    ferro.shutdown()
    ferro.shutdown()
    with pytest.raises(ferro.GroupClosed, match="was closed"):
        first.all_reduce(1.0)
    with ferro.init() as second:
        assert second.all_reduce(2.0) == 2.0


GROWS = """
import os, pathlib, sys, time, ferro
rank, over = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
if rank < 2:
    with ferro.init("gloo", rank=rank, world_size=2, timeout_s=30) as group:
        group.barrier()
    over.touch()
while not over.exists():
    time.sleep(0.01)
with ferro.init("gloo", rank=rank, world_size=3, timeout_s=30) as group:
    print(group.all_reduce(1))
"""


def test_a_world_may_be_made_again_with_more_ranks(tmp_path):
    program = tmp_path / "grows.py"
    program.write_text(GROWS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    ranks = [
        subprocess.Popen(
            [sys.executable, program, tmp_path / "over"],
            env={**os.environ, **meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["3\n"] * 3
