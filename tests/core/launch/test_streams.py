"""Lines and tracebacks, without any process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferro.launch.output import HOLD_S, MAX_HELD_BYTES, MAX_LINE_BYTES, HeldTraceback, LineSplitter
from ferro.launch.report import describe_code, exit_status

HEADER = b"Traceback (most recent call last):\n"
FRAME = b'  File "x.py", line 1, in <module>\n'


@given(st.lists(st.binary(max_size=8) | st.sampled_from([b"\n", b"\r", b"\r\n"])))
def test_lines_lose_nothing_and_end_at_line_ends(pieces: list[bytes]) -> None:
    splitter = LineSplitter()
    found = [line for piece in pieces for line in splitter.feed(piece)]
    assert b"".join([*found, splitter.flush()]) == b"".join(pieces)
    for line in found:
        assert line.endswith((b"\n", b"\r"))
        assert not set(line.removesuffix(b"\r\n")[:-1]) & set(b"\r\n")


@pytest.mark.parametrize("size", [MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 5 * MAX_LINE_BYTES])
def test_lines_are_bounded(size: int) -> None:
    splitter = LineSplitter()
    found = [*splitter.feed(b"x" * size), *splitter.feed(b"y" * size + b"\n")]
    assert b"".join(found) == b"x" * size + b"y" * size + b"\n"
    assert max(map(len, found)) <= MAX_LINE_BYTES


def test_a_traceback_is_held_from_its_first_line() -> None:
    held = HeldTraceback()
    assert held.take(b"before\n", 0.0) == [b"before\n"]
    assert held.take(HEADER, 1.0) == []
    for line in (FRAME, b"ValueError: boom\n", b"after\n"):
        assert held.take(line, 2.0) == []
    assert (held.began, held.error, held.holding) == (1.0, "ValueError: boom", True)
    assert held.release_at() == 1.0 + HOLD_S
    assert held.release() == [HEADER, FRAME, b"ValueError: boom\n", b"after\n"]
    assert held.take(b"goes on\n", 3.0) == [b"goes on\n"]
    assert held.release_at() is None


def test_the_last_of_chained_tracebacks_counts() -> None:
    held = HeldTraceback()
    for line in (HEADER, FRAME, b"ferro.errors.PeerLost: gone\n", b"\n",
                    b"During handling of the above exception, another exception occurred:\n",
                    HEADER, FRAME, b"KeyError: 'x'\n", b"hint: PeerLost\n"):  # fmt: skip
        held.take(line, 0.0)
    assert held.error == "KeyError: 'x'"
    assert not held.is_consequence()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (b"ferro.errors.PeerLost: rank 2 left\n", True),
        (b"ferro.errors.GroupClosed\n", True),
        (b"ferro.errors.CollectiveTimeout: 3 s\n", True),
        (b"ferro.errors.CollectiveMismatch: x\n", False),
        (b"PeerLostInSpace: x\n", False),
        (b"ValueError: PeerLost\n", False),
    ],
)
def test_consequences_are_known_by_their_class(error: bytes, expected: bool) -> None:
    held = HeldTraceback()
    for line in (HEADER, FRAME, error):
        held.take(line, 0.0)
    assert held.is_consequence() is expected


def test_what_is_held_is_bounded() -> None:
    held = HeldTraceback()
    assert held.take(HEADER, 0.0) == []
    line = b"x" * 65535 + b"\n"
    shown: list[bytes] = []
    while not shown:
        shown = held.take(line, 0.0)
    assert sum(map(len, shown)) <= MAX_HELD_BYTES + len(line)
    assert not held.holding


@pytest.mark.parametrize(
    ("code", "text", "status"),
    [
        (3, "exit code 3", 3),
        (-11, "killed by SIGSEGV", 139),
        (-9, "killed by SIGKILL, maybe out of memory", 137),
        (-63, "killed by signal 63", 191),
    ],
)
def test_how_a_rank_ended(code: int, text: str, status: int) -> None:
    assert describe_code(code) == text
    assert exit_status(code) == status
