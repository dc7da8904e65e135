"""Who is named when a deadline passes: the ranks that keep the others, and nobody else."""

import pytest

from ferro.group.failure_report import FailureReport
from ferro.group.group_info import GroupInfo
from ferro.group.timeout_diagnosis import diagnose
from ferro.rendezvous.store.memory import MemoryStore


def info(world_size, first=0):
    ranks = tuple(range(first, first + world_size))
    store = MemoryStore()
    return GroupInfo(
        name="g", backend_name="b", global_ranks=ranks, hosts=("h",) * world_size, job_store=store, store=store
    )


def collective(seq, op="all_reduce", awaited=()):
    return FailureReport(text=f"{op} #{seq}", op=op, seq=seq, collectives=seq + 1, awaited=awaited)


def transfer(op, peer, collectives=0):
    return FailureReport(text=f"{op} with {peer}", op=op, collectives=collectives, peers=(peer,))


SILENT = FailureReport()


@pytest.mark.parametrize(
    ("own", "others", "missing"),
    [
        pytest.param(collective(3), [collective(3), SILENT], [2], id="silent"),
        pytest.param(collective(3), [collective(2), collective(3)], [1], id="behind"),
        pytest.param(collective(3), [collective(4), SILENT], [2], id="ahead"),
        pytest.param(collective(3), [transfer("recv", 2, collectives=5), SILENT], [2], id="ahead in a transfer"),
        pytest.param(collective(3), [transfer("recv", 2, collectives=3), SILENT], [1, 2], id="behind in a transfer"),
        pytest.param(collective(3), [collective(3), collective(3)], [], id="all there"),
        pytest.param(
            collective(3, "broadcast", awaited=(1,)),
            [collective(3, "broadcast", awaited=(2,)), SILENT, SILENT],
            [2],
            id="a root that has gone on is not missing",
        ),
        pytest.param(collective(3, "broadcast"), [collective(3, "broadcast"), SILENT], [2], id="waits not known"),
        pytest.param(
            collective(3), [FailureReport(left=True, collectives=3), collective(3)], [1], id="left in good order"
        ),
    ],
)
def test_missing_from_a_collective(own, others, missing):
    found = diagnose(info(len(others) + 1), 0, own, dict(enumerate(others, 1)))
    assert found.missing == missing
    told = [0, *(rank for rank, report in enumerate(others, 1) if report.text or report.left)]
    assert found.arrived == [rank for rank in told if rank not in missing]


@pytest.mark.parametrize(
    ("own", "others", "missing", "words"),
    [
        pytest.param(transfer("recv", 1), [SILENT, SILENT], [1], "did not arrive: rank 1", id="the peer"),
        pytest.param(
            transfer("recv", 1),
            [transfer("recv", 2), transfer("recv", 3), SILENT],
            [3],
            "did not arrive: rank 3",
            id="the end of a chain",
        ),
        pytest.param(
            transfer("recv", 1),
            [transfer("recv", 2), collective(4), SILENT],
            [2],
            "was in all_reduce #4",
            id="elsewhere",
        ),
        pytest.param(transfer("send", 1), [transfer("recv", 0), SILENT], [], "all ranks were there", id="a slow link"),
        pytest.param(
            transfer("send", 1), [transfer("send", 0)], [], "deadlock: both ranks are sending", id="both send"
        ),
        pytest.param(
            transfer("recv", 1), [transfer("recv", 0)], [], "deadlock: both ranks are receiving", id="both receive"
        ),
        pytest.param(
            transfer("recv", 1),
            [transfer("recv", 2), transfer("recv", 0)],
            [],
            "deadlock: all of these ranks are receiving",
            id="a circle",
        ),
    ],
)
def test_missing_from_a_transfer(own, others, missing, words):
    found = diagnose(info(len(others) + 1), 0, own, dict(enumerate(others, 1)))
    assert found.missing == missing
    assert words in found.finding
    assert ("Use sendrecv" in found.remedy) == ("deadlock" in words)


def test_the_log_to_be_read_has_the_rank_in_the_world():
    found = diagnose(info(2, first=4), 0, collective(0), {1: SILENT})
    assert "did not arrive: rank 1 (rank 5 of the world, host h)" in found.finding
    assert found.remedy == "Read the log of rank 5 of the world first"
