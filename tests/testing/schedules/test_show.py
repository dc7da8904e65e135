"""`ferro show collective`: the pictures of core's algorithms and of anybody's."""

import pytest

from ferro import collectives
from ferro.cli.main import main
from ferro.collectives import CollectiveInfo, Recv, Round, Schedule, Send
from ferro_testing.schedules import table


def test_an_algorithm_is_proved_and_drawn_for_so_many_ranks(capsys):
    assert main(["show", "collective", "all_reduce", "ring", "-n", "3"]) == 0
    first, *picture = capsys.readouterr().out.rstrip().splitlines()
    assert first == "ring all_reduce, 3 ranks; rounds: 4, messages of the busiest rank: 4; proved right"
    assert "\n".join(picture) == table(collectives.get("all_reduce", "ring").build, 3)


def test_without_an_algorithm_all_are_drawn_and_an_algorithms_name_draws_it_for_each_collective(capsys):
    assert main(["show", "collective", "broadcast", "-np", "8", "--root", "2"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name} broadcast, 8 ranks" in told for name in ("direct", "tree", "scatter_ring"))
    assert max(map(len, told.splitlines())) <= 100
    assert main(["show", "collective", "pairwise"]) == 0
    assert capsys.readouterr().out.startswith("pairwise all_to_all, 4 ranks")


def test_wide_rounds_go_on_below():
    build = collectives.get("all_to_all", "direct").build
    wide, narrow = table(build, 4), table(build, 4, columns=40)
    assert max(map(len, narrow.splitlines())) <= 40
    assert narrow.split() == wide.split()


def test_a_strangers_algorithm_is_drawn_and_a_wrong_one_named(capsys, monkeypatch):
    def build(rank, world_size, root=0):
        if rank == root:
            return Schedule(1, (Round(sends=tuple(Send(peer, (0,)) for peer in range(world_size) if peer != root)),))
        return Schedule(1, (Round(recvs=(Recv(root, (0,)),)),))

    def silent(rank, world_size, root=0):
        return Schedule(1, ())

    offered = {"fan": build, "silent": silent}
    monkeypatch.setattr(collectives, "available", lambda: {"broadcast": tuple(offered)})
    monkeypatch.setattr(
        collectives,
        "get",
        lambda collective, name: CollectiveInfo(collective=collective, algorithm=name, build=offered[name]),
    )
    assert main(["show", "collective", "fan", "-n", "3"]) == 0
    assert "r1  0→1 [0]  0→2 [0]" in capsys.readouterr().out
    assert main(["show", "collective", "silent"]) == 1
    assert "broadcast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "there is no collective or algorithm 'nope'; there are: all_gather (direct, ring); "),
        (["all_reduce", "nope"], "no algorithm 'nope' for 'all_reduce'"),
        (["all_reduce", "-n", "0"], "-n 0: give 1 to 64 ranks"),
        (["broadcast", "--root", "9"], "root"),
        ([], "NAME"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, said):
    assert main(["show", "collective", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
