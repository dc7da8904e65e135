"""A TimeoutError of the program's own, raised by a signal handler in the middle of a call, is what the program sees."""

import signal
import threading
import time

import numpy as np
import pytest

import ferro
from ferro_testing import run_ranks_outcomes


class OwnTimeout(TimeoutError):
    pass


def interrupted(group, call):
    """Rank 1 stays away until rank 0 has been interrupted, and then learns of it."""
    if group.rank == 1:
        time.sleep(1.0)
        try:
            group.barrier(timeout_s=10)
        except ferro.GroupClosed as error:
            return type(error).__name__
    signal.signal(signal.SIGALRM, raise_own_timeout)
    x, y = np.ones(300_000), np.empty(300_000)
    calls = {
        "all_reduce": lambda: group.all_reduce(x),
        "recv": lambda: group.recv(y, 1),
        "sendrecv": lambda: group.sendrecv(x, y, 1),
        "recv_object": lambda: group.recv_object(1),
        "subgroup": lambda: group.split(0),
    }
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGALRM))
    timer.start()
    try:
        calls[call]()
    except TimeoutError as error:
        return type(error).__name__


def raise_own_timeout(signum, frame):
    raise OwnTimeout("by the program")


@pytest.mark.parametrize("transport", ["shared memory", "tcp"])
@pytest.mark.parametrize("call", ["all_reduce", "recv", "sendrecv", "recv_object", "subgroup"])
def test_the_program_sees_its_own_timeout(call, transport):
    env = {"FERRO_GLOO_TRANSPORT": "tcp"} if transport == "tcp" else {}
    outcomes = run_ranks_outcomes(interrupted, 2, backend="gloo", args=[call], timeout_s=60, env=env)
    assert [outcome.result for outcome in outcomes] == ["OwnTimeout", "GroupClosed"], [o.describe() for o in outcomes]
