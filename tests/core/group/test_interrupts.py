"""An exception that comes from outside into the middle of a call: no rank gets a wrong number, and none hangs.

Python runs signal handlers after the calls of a function, so `interrupted` raises there: at every such place in turn.
"""

import dis
import gc
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import ferro
from ferro.simulated import simulate

ROOM = str(Path(ferro.__file__).parent)
STRIDE = 9  # 1 tries every place, which takes half a minute
_places: dict = {}


class Late(BaseException):
    """What a library such as gevent or pytest-timeout raises."""


class LateException(Exception):
    """What a program raises in its signal handler."""


def places(code):
    """Return the offsets of the instructions that follow a call."""
    if code not in _places:
        found, after_call = set(), False
        instructions = list(dis.get_instructions(code))
        for index, instruction in enumerate(instructions):
            if after_call and not only_returns(instructions[index:]):
                found.add(instruction.offset)
            after_call = instruction.opname in ("CALL", "CALL_FUNCTION_EX", "CALL_KW")
        _places[code] = found
    return _places[code]


def only_returns(instructions):
    """Say whether nothing follows but the return: an interrupt is then as if it came right after the call."""
    following = (each.opname for each in instructions)
    return next(name for name in following if name not in ("POP_TOP", "LOAD_CONST", "NOP")) == "RETURN_VALUE"


@contextmanager
def interrupted(number, kind=Late):
    """Raise in this thread at the place with this number; yield a list that is empty if there are fewer."""
    count, raised = -1, []

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(ROOM):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and not raised and frame.f_lasti in places(frame.f_code):
            count += 1
            if count == number:
                raised.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
                raise kind("too slow")
        return trace

    sys.settrace(trace)
    try:
        yield raised
    finally:
        sys.settrace(None)


def add_all(group):
    return float(group.all_reduce(np.array(1.0 + group.rank)))


def result_of(work):
    try:
        return work.wait()
    except (Late, LateException):
        return work.wait()  # it only waits, so an interrupt changes nothing


def add_all_later(group):
    return float(result_of(group.all_reduce(np.array(1.0 + group.rank), async_op=True)))


def send(group):
    if group.rank == 0:
        group.send(np.array(2.0), 1)
        return 3.0
    return 1 + float(group.recv(np.array(0.0), 0))


def receive(group):
    if group.rank == 1:
        group.send(np.array(3.0), 0)
        return 3.0
    return float(group.recv(np.array(0.0), 1))


def swap(group):
    return 2 + group.rank + float(group.sendrecv(np.array(float(group.rank)), np.array(0.0), 1 - group.rank)) * 1


def receive_later(group):
    if group.rank == 1:
        group.send(np.array(3.0), 0)
        return 3.0
    return float(result_of(group.recv(np.array(0.0), 1, async_op=True)))


def give_object(group):
    return group.broadcast_object(3.0 if group.rank == 0 else None)


def take_object(group):
    if group.rank == 1:
        group.send_object(3.0, 0)
        return 3.0
    return group.recv_object(1)


def add_together(group):
    with group.coalesce() as together:
        first = together.all_reduce(np.array(1.0 + group.rank))
        together.all_reduce(np.array([1], np.int64))
    try:
        return float(first.result())
    except (Late, LateException):
        return float(first.result())


def spread(group):
    return 2.0 + float(group.scatter(np.ones(2) if group.rank == 0 else None)[0])


CALLS = [add_all, add_all_later, send, receive, swap, receive_later, give_object, take_object, add_together, spread]


def outcomes(call, number, kind):
    """Interrupt rank 0's call at a place, and repeat it if it was not made; return the place and all ranks' results."""
    where = []

    def work(group):
        results = []
        try:
            if group.rank == 0:
                try:
                    with interrupted(number, kind) as raised:
                        results.append(call(group))
                except kind:
                    where.append(raised)
                    if group._dispatcher.state == "open":  # as if the call had not been made
                        results.append(call(group))
                else:
                    where.append(raised)
            else:
                results.append(call(group))
            results.append(float(group.all_reduce(np.array(10.0))))
            results.append(call(group))
        except ferro.FerroError as error:
            results.append(type(error).__name__)
        except kind as error:
            results.append(f"masked {error}")
        return results

    try:
        results = simulate(work, 2, timeout_s=3, run_timeout_s=10)
    except BaseException as error:  # noqa: BLE001 - shown with its place
        results = [f"{type(error).__name__}: {error}"]
    return (where[0][0] if where and where[0] else None), results


@pytest.fixture(autouse=True)
def no_collection():
    gc.collect()
    gc.disable()  # an interrupt in a __del__ is only printed
    yield
    gc.enable()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_an_interrupt_at_any_place_leaves_no_wrong_number(call):
    number, ended, wrong = CALLS.index(call) % STRIDE, 0, []
    while True:
        kind = (Late, LateException)[number % 2]
        place, results = outcomes(call, number, kind)
        if place is None and results == [[3.0, 20.0, 3.0]] * 2:
            break
        for rank, found in enumerate(results):
            if found not in ([3.0, 20.0, 3.0], ["GroupClosed"], [3.0, "GroupClosed"], [3.0, 20.0, "GroupClosed"]):
                wrong.append((number, place, rank, found))
        ended += "GroupClosed" in results[0]
        number += STRIDE
    assert not wrong
    assert number > 10, "nothing was interrupted"
    assert ended or call is receive_later, "no interrupt came in the middle"
