"""copy=False: an asynchronous operation uses its input where it is; otherwise a copy of its own."""

import threading

import numpy as np
import pytest

import ferro

# The backend's method, and the call.
CALLS = {
    "gather": ("gather", lambda g, x, o: g.gather(x, root=1, async_op=True, **o)),
    "scatter": ("scatter", lambda g, x, o: g.scatter(x, root=0, async_op=True, **o)),
    "reduce_scatter": ("reduce_scatter", lambda g, x, o: g.reduce_scatter(x, async_op=True, **o)),
    "all_to_all": ("all_to_all", lambda g, x, o: g.all_to_all(x, async_op=True, **o)),
    "uneven all_to_all": ("all_to_all", lambda g, x, o: g.all_to_all(x, send_sizes=[3, 1], async_op=True, **o)),
    "send": ("send", lambda g, x, o: send_or_receive(g, x, o)),
    "sendrecv": ("send", lambda g, x, o: g.sendrecv(x, np.empty_like(x), 1 - g.rank, async_op=True, **o)),
}


def send_or_receive(group, x, options):
    if group.rank == 0:
        return group.send(x, 1, async_op=True, **options)
    return group.recv(np.empty_like(x), 0, async_op=True)


def arrays_in(values):
    for value in values:
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, list | tuple):
            yield from arrays_in(value)


def outcome(name, **options):
    """Return whether rank 0's backend is given the caller's memory, and what the ranks get."""
    method, call = CALLS[name]

    def run(group):
        x, given = np.arange(4.0) + group.rank, []
        original = getattr(group.backend, method)

        def spied(*arguments, **keywords):
            given.extend(arrays_in(arguments))
            return original(*arguments, **keywords)

        setattr(group.backend, method, spied)
        result = call(group, x, options).wait()
        used = any(np.shares_memory(array, x) for array in given)
        return used, None if result is None else np.asarray(result).tolist()

    ranks = ferro.simulate(run, 2, timeout_s=10, run_timeout_s=30)
    return ranks[0][0], [result for _, result in ranks]


@pytest.mark.parametrize("name", CALLS)
def test_the_input_is_used_where_it_is_only_when_the_caller_says_so(name):
    used_by_default, results = outcome(name)
    assert not used_by_default
    assert outcome(name, copy=False) == (True, results)


def test_with_copy_false_all_gather_writes_when_its_turn_comes():
    """Its result may lie where operations before it still read."""

    def run(group):
        x, memory = np.arange(2.0) + group.rank, np.arange(4.0)
        with BlockedExecutor(group) as executor:
            reduced = group.reduce_scatter(memory, async_op=True, copy=False)
            work = group.all_gather(x, out=memory, async_op=True, copy=False)
            np.testing.assert_array_equal(memory, np.arange(4.0))
            executor.go_on()
        return reduced.wait().tolist(), work.wait().tolist()

    results = ferro.simulate(run, 2, timeout_s=10, run_timeout_s=30)
    assert results == [([0.0, 2.0], [0, 1, 1, 2]), ([4.0, 6.0], [0, 1, 1, 2])]


class BlockedExecutor:
    """Lets no collective of a group begin before `go_on`."""

    def __init__(self, group):
        self._group = group
        self._release = threading.Event()

    def __enter__(self):
        original = self._group.backend.agree

        def agree(call, *, deadline):
            assert self._release.wait(10)
            original(call, deadline=deadline)

        self._group.backend.agree = agree
        return self

    def go_on(self):
        self._release.set()

    def __exit__(self, *_):
        self._release.set()
