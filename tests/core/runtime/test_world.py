"""ferro.init between real processes: how ranks meet, and what they say when they do not fit."""

from __future__ import annotations

import json
import os
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
import os, sys
import ferro
group = ferro.init(timeout_s=20)
child = os.fork()
if not child:
    try:
        group.all_reduce(1.0)
    except ferro.UsageError as error:
        print(error, flush=True)
    sys.exit(0)
os.waitpid(child, 0)
assert group.all_reduce(1.0) == 2.0
ferro.shutdown()
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
        for output, errors in ended:
            assert output, errors
        return [read(output) for output, _ in ended]

    return run


def arguments_of(arguments):
    """Return a program's argument: init's as JSON, or just the rank."""
    if isinstance(arguments, int):
        return str(arguments)
    return json.dumps({"timeout_s": 10, **arguments})


def place(store, rank, size, **others):
    host, port = store.address
    return {"RANK": rank, "WORLD_SIZE": size, "FERRO_STORE": f"{host}:{port}", "FERRO_SECRET": SECRET.hex(), **others}


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
        assert "still misses ranks [2] of 3 (present: [0, 1])" in text


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
    with pytest.raises(ferro.UsageError, match="3 is no observer: it has no started, finished"):
        ferro.init(observers=[3])


def test_several_hosts_need_to_be_told_where_to_meet(ranks):
    variables = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    [(kind, text)] = ranks((variables, {}))
    assert kind == "UsageError"
    assert "Set MASTER_ADDR and MASTER_PORT" in text
    assert "from RANK" in text


def test_meeting_again_and_again_where_rank_zero_hosts_the_store(ranks, tmp_path):
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": f"again {tmp_path}"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    places = [({**shared, "RANK": rank, "LOCAL_RANK": rank}, rank) for rank in range(2)]
    assert ranks(*places, source=AGAIN, read=str.strip) == ["ok", "ok"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_leaves_its_parents_world_alone(ranks, store):
    places = [(place(store, rank, 2), rank) for rank in range(2)]
    for output in ranks(*places, source=FORKING, read=str):
        assert "this process was forked from process" in output
        assert output.endswith("ok\n")


def test_a_rank_of_another_version_with_other_fields_is_named():
    from ferro.rendezvous import MemoryStore
    from ferro.rendezvous.meeting.membership import RankRecord, check_membership

    shared = MemoryStore()
    shared.add("joined", 1)
    stranger = {"rank": 1, "world_size": 2, "version": "9.9", "host": "n02", "pid": 7, "new": 1}
    shared.set("join/1", json.dumps(stranger).encode())
    mine = RankRecord(rank=0, world_size=2, host="n01", pid=6, address="::1", version="0.1", backend="gloo")
    with pytest.raises(ferro.RendezvousError, match="differ in the version of ferro") as caught:
        check_membership(shared, mine, deadline=0.0)
    assert "rank 1 (host n02, pid 7) has '9.9'" in str(caught.value)


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
