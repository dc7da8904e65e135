"""What launchers of several nodes do when one of them is gone."""

import dataclasses
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ferro.errors import RendezvousError, UsageError
from ferro.launch import nodes
from ferro.launch.options import LaunchOptions, parse_options
from ferro.launch.report import Failure

from .conftest import TIMEOUT_S, alive, until

SECRET = b"s" * 32


@pytest.fixture
def options() -> Callable[..., LaunchOptions]:
    """Options for a node of a two-node job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"

    def make(node_rank: int, *extra: str) -> LaunchOptions:
        common = ["--nnodes", "2", "--rdzv-endpoint", endpoint, "--node-rank", str(node_rank)]
        return parse_options([*common, *extra, __file__], {})

    return make


class OtherNode(threading.Thread):
    """Node 1's launcher, in a thread."""

    def __init__(self, options: LaunchOptions, act: Callable[[nodes.NodeRendezvous], None]) -> None:
        super().__init__(daemon=True)
        self._options = options
        self._act = act
        self.done = False

    def run(self) -> None:
        with nodes.NodeRendezvous(self._options, SECRET) as node:
            self._act(node)
            self.done = True

    def __enter__(self) -> "OtherNode":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join(TIMEOUT_S)
        assert self.done


def test_the_first_cause_of_all_nodes_is_agreed_on(options: Callable[..., LaunchOptions]) -> None:
    lost = Failure(what="rank 0 failed first", status=1, after_s=1.0, consequence=True)
    cause = Failure(what="rank 3 failed first", status=7, after_s=2.0)
    told: list[Failure | None] = []
    with (
        OtherNode(options(1), lambda node: told.append(node.first_failure(0, cause))),
        nodes.NodeRendezvous(options(0), SECRET) as node,
    ):
        told.append(node.first_failure(0, lost))
    assert told == [cause, cause]


def test_a_node_that_falls_silent_is_a_failure(
    options: Callable[..., LaunchOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_LOST_S", 0.2)
    monkeypatch.setattr(nodes, "_HEARTBEAT_S", 0.05)
    over = threading.Event()

    def fall_silent(node: nodes.NodeRendezvous) -> None:
        node._over.set()  # ends its heartbeats
        over.wait(TIMEOUT_S)

    with OtherNode(options(1), fall_silent):
        with nodes.NodeRendezvous(options(0), SECRET) as node:
            failure = node.first_failure(0, None)
            over.set()
        assert failure is not None
        assert "the launcher of node 1 was not heard of" in failure.what
        assert not failure.restart


def test_one_failure_stops_the_other_node(options: Callable[..., LaunchOptions]) -> None:
    stopped = threading.Event()

    def watch(node: nodes.NodeRendezvous) -> None:
        until(lambda: node.stopped(0), "the failure to be told")
        stopped.set()
        node.first_failure(0, None)

    with OtherNode(options(1), watch), nodes.NodeRendezvous(options(0), SECRET) as node:
        node.first_failure(0, Failure(what="rank 0 failed first", status=1, after_s=1.0))
        assert stopped.is_set()


def test_a_second_launcher_for_a_node_is_refused_and_disturbs_nobody(options: Callable[..., LaunchOptions]) -> None:
    refused: list[UsageError] = []

    def meet_again(node: nodes.NodeRendezvous) -> None:
        with pytest.raises(UsageError, match="already is node 1") as caught:
            nodes.NodeRendezvous(options(1), SECRET)
        refused.append(caught.value)
        node.first_failure(0, None)

    with OtherNode(options(1), meet_again), nodes.NodeRendezvous(options(0), SECRET) as node:
        assert node.first_failure(0, None) is None
    assert len(refused) == 1


def test_a_node_that_does_not_come(options: Callable[..., LaunchOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "JOIN_S", 0.2)
    with pytest.raises(RendezvousError, match="node 1 did not come"):
        nodes.NodeRendezvous(options(0), SECRET)


def test_ranks_end_when_node_0_is_gone(tmp_path: Path, start: Callable) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    program = tmp_path / "program.py"
    program.write_text(f"import os, time; open({str(tmp_path)!r} + f'/pid{{os.getpid()}}', 'w')\n"
                       "time.sleep(60)")  # fmt: skip
    first, second = (
        start("run", "--nnodes", 2, "--node-rank", r, "--rdzv-endpoint", endpoint, program,
              FERRO_SECRET="5e" * 32)
        for r in range(2)
    )  # fmt: skip
    until(lambda: len(list(tmp_path.glob("pid*"))) == 2, "the ranks to start")
    ranks = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
    first.kill()
    _, err = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 1
    assert b"is gone" in err
    until(lambda: not any(map(alive, ranks)), "the ranks to end")


def test_a_killed_launcher_ends_the_other_node_at_once(tmp_path: Path, start: Callable) -> None:
    """Node 1's launcher is killed; node 0 does not wait for its heartbeats to be missed for a minute."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    program = tmp_path / "program.py"
    program.write_text(f"import os, time; open({str(tmp_path)!r} + f'/pid{{os.getpid()}}', 'w')\ntime.sleep(60)")
    first, second = (
        start(*("run", "--nnodes", 2, "--node-rank", r, "--rdzv-endpoint", endpoint, program), FERRO_SECRET="5e" * 32)
        for r in range(2)
    )
    until(lambda: len(list(tmp_path.glob("pid*"))) == 2, "the ranks to start")
    second.kill()
    _, err = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 1
    assert b"the launcher of node 1 is gone" in err


def test_the_user_is_told_whom_a_node_waits_for(
    options: Callable[..., LaunchOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 0 waits for node 1, which comes once node 0 has said so; a name that does not resolve is said to be one."""
    monkeypatch.setattr(nodes, "_NOTICE_S", 0.01)
    monkeypatch.setattr(nodes, "_NEXT_NOTICE_S", 0.1)  # the first may come before node 0 listens
    said: list[str] = []
    told = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if "node 1 of 2" in text:
            told.set()

    def join_late() -> None:
        assert told.wait(TIMEOUT_S)
        with nodes.NodeRendezvous(options(1), SECRET):
            pass

    other = threading.Thread(target=join_late)
    other.start()
    with nodes.NodeRendezvous(options(0), SECRET, say):
        pass
    other.join(TIMEOUT_S)
    assert re.match(r"waiting for node 1 of 2 at 127\.0\.0\.1:\d+; \d+ s of 300 s", said[-1])
    monkeypatch.setattr(nodes, "JOIN_S", 0.5)
    nowhere = dataclasses.replace(options(1), endpoint=("nowhere.invalid", 1))
    with pytest.raises(RendezvousError):
        nodes.NodeRendezvous(nowhere, SECRET, said.append)
    assert "waiting for node 0 of 2 at nowhere.invalid:1, a name that cannot be resolved so far" in said[-1]


def test_the_rank_that_ended_early_on_another_node_is_named(options: Callable[..., LaunchOptions]) -> None:
    lost = Failure(what="rank 1 failed first", status=1, after_s=2.0, consequence=True, named=(0,))
    with (
        OtherNode(options(1), lambda node: node.first_failure(0, lost)),
        nodes.NodeRendezvous(options(0), SECRET) as node,
    ):
        found = node.first_failure(0, None, {0: 0.5})
    assert found is not None
    assert found.what.startswith("rank 0 ended with exit code 0 after 0.5 s")


def test_a_network_that_is_down_does_not_hold_up_the_launcher(
    options: Callable[..., LaunchOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request to node 0 that is not answered delays neither the watch over the ranks nor ends the job."""
    monkeypatch.setattr(nodes, "_HEARTBEAT_S", 0.01)
    down, up = threading.Event(), threading.Event()
    with (
        OtherNode(options(1), lambda node: node.first_failure(0, None)),
        nodes.NodeRendezvous(options(0), SECRET) as node,
    ):
        add = node._store.add

        def unanswered(key: str, amount: int) -> int:
            down.set()
            assert up.wait(TIMEOUT_S)
            return add(key, amount)

        monkeypatch.setattr(node._store, "add", unanswered)
        assert down.wait(TIMEOUT_S)
        assert not node.stopped(0)
        up.set()
        assert node.first_failure(0, None) is None
