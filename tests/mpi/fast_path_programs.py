"""The functions that ranks run in the tests of fast paths and persistent operations."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np

import ferro


def mixed_paths(group):
    """Make each call several times; from the second on some ranks take the fast path, others the ordinary one."""
    n, me, wrong = group.world_size, group.rank, []
    for count in (1, 6, 7, 3000, 9000, 40_000):
        for dtype in (np.float64, np.int16):
            for turn in range(4):
                ordinary = turn > 1 and (me + turn) % 2 == 0
                for name, (call, expected) in _calls(n, me, count, dtype, turn).items():
                    found = call(group, ordinary)
                    if ordinary and found is not None:
                        found = found.wait()
                    if expected is not None and not np.array_equal(found, expected):
                        wrong.append((name, count, turn))
    return wrong


def _calls(n, me, count, dtype, turn):
    whole = (np.arange(n * count) % 50).astype(dtype).reshape(n, count)
    mine, every = whole[0] + dtype(me + turn), np.concatenate([whole[0] + dtype(r + turn) for r in range(n)])
    total = sum((whole[0] + dtype(r + turn) for r in range(n)), np.zeros(count, dtype))
    blocks = whole + dtype(me)
    exchanged = np.stack([whole[me] + dtype(r) for r in range(n)])
    root = turn % n
    return {
        "all_reduce": (lambda g, a: g.all_reduce(mine, async_op=a), total),
        "max": (lambda g, a: g.all_reduce(mine, "max", async_op=a), whole[0] + dtype(n - 1 + turn)),
        "reduce": (lambda g, a: g.reduce(mine, root, async_op=a), total if me == root else None),
        "broadcast": (lambda g, a: g.broadcast(mine, root, async_op=a), whole[0] + dtype(root + turn)),
        "all_gather": (lambda g, a: g.all_gather(mine, async_op=a), every),
        "gather": (lambda g, a: g.gather(mine, root, async_op=a), every if me == root else None),
        "scatter": (lambda g, a: g.scatter(every, root, async_op=a), every.reshape(n, -1)[me]),
        "reduce_scatter": (
            lambda g, a: g.reduce_scatter(blocks, async_op=a),
            (whole[me] * dtype(n) + dtype(n * (n - 1) // 2)).reshape(1, -1),
        ),
        "all_to_all": (lambda g, a: g.all_to_all(blocks, async_op=a), exchanged),
        "barrier": (lambda g, a: g.barrier(async_op=a), None),
    }


def steps_and_others(group, count):
    """Start steps of two persistent operations, with other collectives in between."""
    n, found = group.world_size, []
    x, y = np.zeros(count), np.zeros(count)
    total = group.persistent("all_reduce", x, out=x)
    spread = group.persistent("broadcast", y, root=1, out=y)
    for turn in range(6):
        x[...], y[...] = turn, group.rank + turn
        total.start()
        spread.start()
        other = int(group.all_reduce(np.array(1)))
        found.append((spread.wait() == 1 + turn).all() and (total.wait() == n * turn).all() and other == n)
        x[...] = 1
        found.append((total() == n).all())
    total.close()
    spread.close()
    return [bool(good) for good in found]


def skip_a_step(group, count):
    """Leave out a step on one rank, whose next call is another."""
    x = np.ones(count)
    step = group.persistent("all_reduce", x, out=x)
    try:
        for turn in range(4):
            if group.rank != 1 or turn != 2:
                step()
        group.all_reduce(np.ones(count))
    except ferro.CollectiveMismatch as error:
        return "persistent 1" in str(error)
    return "nothing"


def late_steps(group, counts):
    """Stay away from steps of several groups until the other rank has given up all of them."""
    late, outcomes = group.rank == 1, {}

    def prepare(count, started):
        part = group.subgroup(range(2))
        x = np.ones(count)
        step = part.persistent("all_reduce", x, out=x, timeout_s=20.0 if late else 0.3)
        for _ in range(3):
            step()

        def run():
            try:
                if started:
                    step.start()
                    step.wait()
                else:
                    step()
            except ferro.FerroError as error:
                outcomes[f"{count}, started={started}"] = type(error).__name__

        return run

    runs = [prepare(count, started) for count in counts for started in (False, True)]
    if late:
        group.barrier()
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not late:
        group.barrier()
    return [outcomes, int(group.all_reduce(1))]


def halo(group):
    """Exchange with both neighbours on a ring, many times; drop some exchanges, and close others."""
    from ferro_mpi.requests import PersistentRequests

    n, me, found = group.world_size, group.rank, []
    right, left = (me + 1) % n, (me - 1) % n
    for count in (3, 50_000):
        sent, from_left, from_right = np.zeros((2, count)), np.zeros(count), np.zeros(count)
        step = group.persistent(
            "exchange", [(right, sent[0]), (left, sent[1])], [(left, from_left), (right, from_right)]
        )
        for turn in range(20):
            sent[0], sent[1] = me + turn, 100 + me + turn
            if turn % 2:
                step()
            else:
                step.start()
                step.wait()
            found.append(bool((from_left == left + turn).all() and (from_right == 100 + right + turn).all()))
    step.close()
    del step
    gc.collect()
    PersistentRequests.free_dropped()
    return all(found) and not any(kept.requests for kept in PersistentRequests._all)


def lonely_halo(group):
    """Run a step of an exchange that the other rank does not run."""
    part = group.subgroup(range(2))
    sent, taken = np.ones(300_000), np.empty(300_000)
    step = part.persistent("exchange", [(1 - group.rank, sent)], [(1 - group.rank, taken)], timeout_s=0.3)
    step()
    outcome = "away"
    if group.rank == 0:
        try:
            step()
        except ferro.CollectiveTimeout as error:
            outcome = str(error)
    return [outcome, int(group.all_reduce(1))]


class Interrupt(BaseException):
    """A program's own exception, as a signal handler raises it."""


def interrupted(group):
    """Be interrupted on the fast path, between the agreement on a large collective and MPI's part of it."""
    part = group.subgroup(range(2))
    x = np.ones(100_000)
    for _ in range(3):
        part.all_reduce(x)
    if group.rank == 0:
        agreement = part.backend._agreement
        publish = agreement.publish_with

        def publish_and_interrupt(*args):
            publish(*args)
            give_up_s = time.monotonic() + 20
            for index in agreement.looks[agreement.number & 1]:  # the other rank is in the call
                while agreement.words[index] != agreement.word and time.monotonic() < give_up_s:
                    time.sleep(1e-3)
            raise Interrupt

        agreement.publish_with = publish_and_interrupt
    outcome = "nothing"
    try:
        outcome = float(part.all_reduce(x)[0])
    except Interrupt:
        outcome = "interrupted"
    except ferro.GroupClosed:
        outcome = "closed"
    return [outcome, int(group.all_reduce(1))]
