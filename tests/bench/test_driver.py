"""Worlds that misbehave: ranks that are strangers, die, hang, or belong to another library."""

import os
import socket
import sys
from dataclasses import dataclass

import pytest

from ferro.errors import BackendError
from ferro_bench.contestants import Contestant
from ferro_bench.driver import open_worlds
from ferro_bench.measure import make_case, measure
from ferro_bench.peers import Installed
from ferro_bench.rank.channel import Channel

CHANNEL = """
import json, os, sys, time
from ferro_bench.rank.channel import Channel
task = json.load(open(sys.argv[1]))
def report(rank=0, world_size=1, version="toy 1"):
    channel = Channel(task["host"], task["port"], bytes.fromhex(task["secret"]))
    channel.send(dict(world=task["world"], rank=rank, world_size=world_size, version=version))
    return channel
"""


@dataclass(frozen=True)
class Toy:
    """A plan whose ranks run a program of the test's."""

    program: str
    name: str = "toy"
    world_size: int = 1
    backend: str = ""
    peer: Installed | None = None

    def commands(self, task):
        return [[sys.executable, "-c", CHANNEL + self.program, str(task)]] * self.world_size


def test_a_well_behaved_toy_is_measured():
    toy = """
channel = report()
while (order := channel.receive())["do"] != "end":
    channel.send({"seconds": [0.25, 0.5], "wrong": order.get("turn", 0)})
"""
    with open_worlds([Toy(toy)]) as worlds:
        assert worlds["toy"].version == "toy 1"
        case = make_case("all_reduce", 64, 1)
        measured = measure(worlds, case, [Contestant("toy")], 2)["toy"]
    assert measured.seconds.tolist() == [[0.25, 0.5]] * 2
    assert measured.wrong == 0 + 1 + 2  # the turn that is not timed is checked as well


def test_a_case_that_takes_long_gets_few_turns():
    toy = """
channel = report()
while (order := channel.receive())["do"] != "end":
    channel.send({"seconds": [0.25], "wrong": 0})
"""
    with open_worlds([Toy(toy)]) as worlds:
        case = make_case("all_reduce", 64, 1)
        measured = measure(worlds, case, [Contestant("toy")], 16, limit_s=0.0)["toy"]
        unlimited = measure(worlds, case, [Contestant("toy")], 16)["toy"]
    assert (len(measured.seconds), len(unlimited.seconds)) == (4, 16)


def test_a_call_takes_as_long_as_on_its_slowest_rank():
    toy = """
rank = int(os.path.exists(sys.argv[1] + ".0"))
try:
    os.close(os.open(sys.argv[1] + ".0", os.O_CREAT | os.O_EXCL))
    rank = 0
except FileExistsError:
    rank = 1
channel = report(rank, 2)
while (order := channel.receive())["do"] != "end":
    channel.send({"seconds": [[1.0, 4.0], [3.0, 2.0]][rank], "wrong": 0})
"""
    with open_worlds([Toy(toy, world_size=2)]) as worlds:
        case = make_case("all_reduce", 64, 2)
        measured = measure(worlds, case, [Contestant("toy")], 1)["toy"]
    assert measured.seconds.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('no luck'); sys.exit(3)", "ended before all its ranks were connected.*no luck"),
        ("report(rank=0, world_size=2); time.sleep(60)", "a rank says it is 0 of 2"),
    ],
)
def test_a_world_that_does_not_come_about_is_an_error(program, said):
    with pytest.raises(BackendError, match=f"(?s){said}"), open_worlds([Toy(program)]):
        pytest.fail("there is no such world")


def test_an_mpi_of_another_family_is_an_error():
    peer = Installed(name="mpich", python=sys.executable, mpiexec=None)
    toy = Toy("report(version='Open MPI v5'); time.sleep(60)", name="mpich", peer=peer)
    with pytest.raises(BackendError, match="an environment of its own"), open_worlds([toy]):
        pytest.fail("there is no such world")


def test_a_rank_that_dies_is_an_error_with_its_last_words():
    toy = Toy("report().receive(); sys.exit('out of luck')")
    with (
        open_worlds([toy]) as worlds,
        pytest.raises(BackendError, match=r"(?s)toy, 1 ranks: it lost rank 0.*out of luck"),
    ):
        worlds["toy"].ask({"do": "turn"}, 30.0)


def test_a_rank_that_hangs_is_an_error_and_is_ended():
    toy = Toy("channel = report(); channel.receive(); print(os.getpid(), flush=True); time.sleep(60)")
    with open_worlds([toy]) as worlds:
        with pytest.raises(BackendError, match=r"not answer within 0\.5 s") as raised:
            worlds["toy"].ask({"do": "turn"}, 0.5)
        pid = int(str(raised.value).split()[-1])
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_stranger_does_not_get_in():
    """Nor does one keep the ranks out: the toy connects after it."""
    toy = """
import socket
stranger = socket.create_connection((task["host"], task["port"]))
stranger.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
try:
    Channel(task["host"], task["port"], b"another secret")
except ConnectionError:
    report().receive()
"""
    with open_worlds([Toy(toy)]) as worlds:
        assert worlds["toy"].version == "toy 1"


def test_a_rank_does_not_obey_a_driver_without_the_secret():
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    with listener:
        import threading

        def answer():
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"\xf3FERROS\x01" + bytes(32))
                sock.recv(1000)
                sock.sendall(bytes(32))

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with pytest.raises(ConnectionError, match="does not hold its secret"):
                Channel(*address, b"secret")
        finally:
            thread.join(10)
