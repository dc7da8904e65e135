"""Lines and tracebacks, without any process."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferro.launch import output, report
from ferro.launch.output import (
    HOLD_S,
    LONG_PARTIAL_S,
    MAX_HELD_BYTES,
    PARTIAL_S,
    Console,
    HeldTraceback,
    LineSplitter,
    RankOutput,
)
from ferro.launch.report import Failure, describe_code, exit_status, name_early_ranks

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


def test_only_what_no_line_holds_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MAX_LINE_BYTES", 10)
    splitter = LineSplitter()
    found = [line for _ in range(5) for line in splitter.feed(b"1234")]
    assert found == [b"1234" * 3]
    assert splitter.feed(b"\nrest") == [b"1234" * 2 + b"\n"]
    assert splitter.flush() == b"rest"


def test_an_unfinished_line_is_shown_soon_unless_it_is_being_written() -> None:
    splitter = LineSplitter()
    assert splitter.partial_due() is None
    splitter.feed(b"name? ", 1.0)
    splitter.feed(b"[bob] ", 1.05)
    assert splitter.partial_due() == 1.0 + PARTIAL_S
    splitter.feed(b"x" * 5000, 1.5)
    assert splitter.partial_due() == 1.5 + LONG_PARTIAL_S


def test_a_line_that_a_full_buffer_cuts_is_not_taken_for_a_prompt() -> None:
    splitter = LineSplitter()
    splitter.feed(b"1234567\n" * 1023 + b"12345678", 1.0)
    assert splitter.partial_due() == 1.0 + LONG_PARTIAL_S
    assert splitter.feed(b"\n", 1.3) == [b"12345678\n"]
    splitter.feed(b"name? ", 2.0)
    assert splitter.partial_due() == 2.0 + PARTIAL_S


class TestConsole:
    """The bytes on a screen that ranks 0 and 1 share; a piece is (rank, bytes)."""

    @staticmethod
    def shown(*pieces: tuple[int, bytes]) -> bytes:
        screen = io.BytesIO()
        console = Console(2, screen, screen)
        for rank, data in pieces:
            console.write(data, to_stderr=False, source=rank, prefix=b"[%d] " % rank)
        console.say("done")
        return screen.getvalue().removesuffix(b"ferro run: done\n")

    def test_a_line_goes_on_where_it_stopped(self) -> None:
        assert self.shown((0, b"."), (0, b"."), (0, b"\n"), (0, b"end\n")) == b"[0] ..\n[0] end\n"

    def test_another_rank_begins_a_line_of_its_own(self) -> None:
        assert self.shown((0, b"..."), (1, b"x\n"), (0, b".\n")) == b"[0] ...\n[1] x\n[0] .\n"
        assert self.shown((0, b"...")) == b"[0] ...\n"
        # The end of a line that the other rank has ended is no line.
        assert self.shown((0, b"..."), (1, b"x\n"), (0, b"\n"), (0, b"\n")) == b"[0] ...\n[1] x\n[0] \n"

    def test_progress_bars_overwrite_one_another_and_nothing_else(self) -> None:
        bars = ((0, b"\r"), (0, b"1%"), (1, b"\r"), (1, b"2%"), (0, b"\r"), (0, b"3%\r"), (1, b"4%\r"))
        assert self.shown(*bars) == b"\r[0] 1%\r[1] 2%\r[0] 3%\r[1] 4%\r\n"
        assert self.shown((0, b"name? "), (1, b"5%\r")) == b"[0] name? \n[1] 5%\r\n"
        assert self.shown((0, b"5%\r"), (1, b"line\n")) == b"[0] 5%\r\n[1] line\n"


def test_retries_do_not_withhold_what_came_before() -> None:
    held = HeldTraceback()
    for now in (1.0, 1.4, 1.8):
        for line in (HEADER, FRAME, b"ConnectionError: try\n"):
            held.take(line, now)
        assert held.release_at() == 1.0 + HOLD_S
    assert held.began == 1.8


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing() -> None:
    screen = io.BytesIO()
    with open("/dev/full", "wb", buffering=0) as full:
        rank = RankOutput(Console(2, screen, screen), 1, [full, full])
        rank.out.receive(b"one\n")
        rank.out.receive(b"two\n")
    assert screen.getvalue().count(b"ferro run: /dev/full cannot be written") == 1
    assert screen.getvalue().endswith(b"[1] one\n[1] two\n")


def failure(error: str, after_s: float = 2.0) -> Failure:
    held = HeldTraceback()
    held.take(HEADER, 0.0)
    held.take(error.encode() + b"\n", 0.0)
    return Failure(
        what="rank 2 failed first",
        status=1,
        after_s=after_s,
        consequence=held.is_consequence(),
        named=report._named_ranks(held.error),
    )


@pytest.mark.parametrize(
    ("error", "early", "blamed"),
    [
        ("PeerLost: rank 1 (host n) of 3 is gone", {1: 0.5}, [1]),
        ("CollectiveTimeout: arrived: rank 0, 2; did not arrive: rank 1, 3", {1: 0.5, 3: 0.6}, [1, 3]),
        ("PeerLost: rank 1 is gone", {0: 0.5}, []),
        ("PeerLost: rank 1 is gone", {1: 2.5}, [1]),
        ("ValueError: rank 1 is odd", {1: 0.5}, []),
    ],
)
def test_ranks_that_ended_too_early_are_the_cause(error: str, early: dict[int, float], blamed: list[int]) -> None:
    what = name_early_ranks(failure(error), early).what
    assert re.findall(r"rank (\d) ended with exit code 0 after", what) == list(map(str, blamed))
    assert what.endswith("rank 2 failed first")


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
