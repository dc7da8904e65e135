"""Clusters and `spawn`: functions on processes that stay, their results, output and errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import cloudpickle
import pytest

import ferro
from ferro.launch import messages

from .conftest import TIMEOUT_S, alive, clean_environment, until

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as the functions of a notebook are


@pytest.fixture(scope="module")
def ranks():
    with ferro.cluster(2, timeout_s=TIMEOUT_S) as made:
        yield made


def total(value):
    group = ferro.init()
    print(f"{value} on {group.rank}")
    print("no end", end="")
    return int(group.all_reduce(group.rank + value))


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__("cannot be made again")


def test_results_come_by_rank_and_lines_with_their_rank(ranks, capsys):
    assert ranks.run(total, 10) == [21, 21]
    assert sorted(capsys.readouterr().out.splitlines()) == ["[0] 10 on 0", "[0] no end", "[1] 10 on 1", "[1] no end"]


def test_the_group_and_modules_stay(ranks):
    def remember():
        import __main__

        __main__.group = ferro.init()

    def same():
        import __main__

        return __main__.group is ferro.init(), os.getpid()

    ranks.run(remember)
    first, second = ranks.run(same), ranks.run(same)
    assert first == second
    assert [kept for kept, _ in first] == [True, True]


def test_an_error_comes_once_from_the_rank_that_failed_first_and_the_ranks_stay(ranks, capfd):
    def fail():
        group = ferro.init()
        if group.rank == 1:
            raise KeyError("rank one has no key")
        group.all_reduce(1.0)

    pids = ranks.run(os.getpid)
    with pytest.raises(KeyError, match="rank one has no key") as caught:
        ranks.run(fail)
    notes = caught.value.__notes__
    assert notes[0] == "(raised on rank 1)"
    assert notes[1].startswith("rank 0 ended with ferro.errors.PeerLost")
    assert 'raise KeyError("rank one has no key")' in str(caught.value.__cause__)
    assert "cluster_rank" not in str(caught.value.__cause__)
    assert "Traceback" not in capfd.readouterr().err
    assert ranks.run(total, 1) == [3, 3]
    assert ranks.run(os.getpid) == pids


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (lambda: threading.Lock(), ferro.UsageError, "the result cannot be sent between processes"),
        (lambda: sys.exit(3), ferro.FerroError, "SystemExit: 3"),
        (lambda: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
)
def test_every_kind_of_error(ranks, function, kind, words):
    with pytest.raises(kind, match=words):
        ranks.run(function)


def test_an_exception_that_cannot_be_made_again(ranks):
    def fail():
        raise Unsendable(1, 2)

    with pytest.raises(ferro.FerroError, match=r"Unsendable: cannot be made again"):
        ranks.run(fail)


def test_arguments_that_cannot_be_sent(ranks):
    with pytest.raises(ferro.UsageError, match="total with its arguments cannot be sent between processes"):
        ranks.run(total, threading.Lock())


def test_an_interrupt_ends_the_function_and_not_the_ranks(ranks, tmp_path):
    def wait():
        (tmp_path / str(ferro.init().rank)).touch()
        time.sleep(TIMEOUT_S)

    def interrupt():
        until(lambda: len(list(tmp_path.iterdir())) == 2, "both ranks wait")
        os.kill(os.getpid(), signal.SIGINT)

    pids = ranks.run(os.getpid)
    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            ranks.run(wait)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert ranks.run(total, 1) == [3, 3]
    assert ranks.run(os.getpid) == pids


def test_a_rank_that_dies_is_named_and_ends_the_others(capsys):
    def die():
        group = ferro.init()
        if group.rank == 1:
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        group.barrier()

    ranks = ferro.cluster(2)
    pids = ranks.run(os.getpid)
    with pytest.raises(ferro.PeerLost, match="rank 1 died while it ran the function: killed by SIGKILL") as caught:
        ranks.run(die)
    assert caught.value.peer == 1
    assert "[1] last words" in capsys.readouterr().out
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(ferro.UsageError, match="the ranks have ended: rank 1 died"):
        ranks.run(os.getpid)
    ranks.close()


def test_without_the_library_functions_of_modules_can_be_sent(ranks, monkeypatch):
    monkeypatch.setattr(messages, "_LIBRARY", "no_such_library")
    monkeypatch.setattr(total, "__module__", "__main__")
    assert len(set(ranks.run(os.getpid))) == 2
    with pytest.raises(ferro.UsageError, match=r"total is defined in the notebook .*pip install cloudpickle"):
        ranks.run(total, 1)
    with pytest.raises(ferro.UsageError, match=r"cannot be sent between processes.*pip install cloudpickle"):
        ranks.run(lambda: 1)


def test_a_cluster_has_at_least_one_rank():
    with pytest.raises(ferro.UsageError, match="a whole number from 1, not 0"):
        ferro.cluster(0)


PROGRAM = """
import os, sys, ferro

def work(factor):
    with ferro.init() as group:
        return factor * int(group.all_reduce(group.rank))

print(ferro.spawn(work, 3, 2))
kept = ferro.cluster(2)
print(*kept.run(os.getpid))
print(kept.run(work, 5), kept.run(work, 6))
"""


def test_functions_of_a_program_and_ranks_that_nobody_closed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=60, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr
    spawned, pids, kept = done.stdout.splitlines()
    assert (spawned, kept) == ("[6, 6, 6]", "[5, 5] [6, 6]")
    assert not any(alive(int(pid)) for pid in pids.split())
    assert done.stderr == ""
