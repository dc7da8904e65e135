"""The report on a failed attempt: the rank that failed first, and the text for the user."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ferro.launch.options import LaunchOptions
from ferro.launch.output import Console, RankOutput
from ferro.launch.processes import ChildProcess

_RANKS = re.compile(r"\branks? \[?(\d+(?:, \d+)*)")  # as errors name them


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The failure that ended an attempt."""

    what: str  # "rank 2 failed first: exit code 1", "the launcher of node 1 was stopped by SIGTERM"
    status: int  # the exit status that `ferro run` takes over from it
    after_s: float  # seconds after the start of the attempt
    consequence: bool = False  # the rank itself reported another rank's failure as the cause
    restart: bool = True  # starting again could help
    named: tuple[int, ...] = ()  # the ranks that the rank's own error names


@dataclass(frozen=True, slots=True)
class RankProcess:
    """A rank of this node."""

    rank: int
    process: ChildProcess
    output: RankOutput

    @property
    def code(self) -> int:
        """The exit status; 0 until the end was noticed."""
        return 0 if self.process.ended_at is None else self.process.returncode or 0

    @property
    def was_signalled(self) -> bool:
        """Whether the rank ran until the launcher ended it."""
        return self.process.signalled_at is not None

    @property
    def failed(self) -> bool:
        """Whether the rank ended badly, by itself."""
        return self.code != 0 and not self.was_signalled

    @property
    def order(self) -> tuple[bool, bool, float]:
        """A sort key; the smallest belongs to the rank that failed first."""
        held = self.output.traceback
        consequence = held.is_consequence() and (self.was_signalled or self.code > 0)
        began = held.began if held.holding else None
        return consequence, self.was_signalled, began or self.process.ended_at or 0.0


def first_failure(ranks: Sequence[RankProcess]) -> RankProcess | None:
    """Find the rank that failed first; None if all ended well or because the launcher ended them.

    A rank that reports a lost peer comes after one with any other error. A rank that was in the middle of its traceback
    when the launcher ended it counts, too, after those that ended by themselves. Among equals the first sign of failure
    decides: the traceback's beginning, or else the end of the process.
    """
    return min((rank for rank in ranks if rank.failed or _was_failing(rank)), key=lambda rank: rank.order, default=None)


def _was_failing(rank: RankProcess) -> bool:
    """Say whether a traceback had begun when the launcher told the rank to end."""
    held, signalled_at = rank.output.traceback, rank.process.signalled_at
    return bool(rank.code and held.holding and signalled_at and held.began and held.began < signalled_at)


def describe_failure(rank: RankProcess, started: float, *, alone: bool) -> Failure:
    """Describe the rank that failed first, or that is `alone`."""
    # Where the launcher's signal cut the traceback short, the rank would have ended with Python's exit code 1.
    code = 1 if rank.was_signalled else rank.code
    return Failure(
        what=f"rank {rank.rank} failed{'' if alone else ' first'}: {describe_code(code)}",
        status=exit_status(code),
        after_s=(rank.process.ended_at or started) - started,
        consequence=rank.order[0],
        named=_named_ranks(rank.output.traceback.error),
    )


def _named_ranks(error: str) -> tuple[int, ...]:
    return tuple(sorted({int(rank) for ranks in _RANKS.findall(error) for rank in ranks.split(", ")}))


def name_early_ranks(failure: Failure, early: Mapping[int, float]) -> Failure:
    """Name the ranks whose early end explains a failure.

    `early` are the ranks that ended by themselves with exit code 0, and after how many seconds. They explain a failure
    that reports nothing but a lost peer or a deadline, and names them; their processes may have ended last.
    """
    causes = [rank for rank in failure.named if failure.consequence and rank in early]
    if not causes:
        return failure
    ends = ", ".join(f"rank {rank} ended with exit code 0 after {early[rank]:.1f} s" for rank in causes)
    return replace(failure, what=f"{ends}, while others still waited for it; then {failure.what}")


def describe_code(code: int) -> str:
    """Put an exit code, as `subprocess` gives it, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", maybe out of memory" if name == "SIGKILL" else "")


def exit_status(code: int) -> int:
    """Return the exit status that stands for a `subprocess` exit code: 128 + n for signal n."""
    return code if code >= 0 else 128 - code


def join_ranks(ranks: Sequence[RankProcess]) -> str:
    """Put ranks in words, such as "ranks 0, 3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(it.rank) for it in ranks)}"


def show_report(
    console: Console, ranks: Sequence[RankProcess], first: RankProcess | None, failure: Failure, options: LaunchOptions
) -> None:
    """Print the traceback and the failure of the rank that failed first, and a line for each that failed later.

    `failure` is the first in the whole job; `first` is None if no rank of this node failed first.
    """
    shown_now = first is not None and first.output.release()
    text = f"{failure.what} after {failure.after_s:.1f} s"
    if console.prefixed and first is not None and first.output.traceback.error and not shown_now:
        text += " (its traceback is above)"
    others = [rank for rank in ranks if rank is not first]
    ended = [rank for rank in others if rank.was_signalled]
    console.say(text + (f"; ended {join_ranks(ended)}." if ended else "."))
    if killed := [rank for rank in ended if rank.code == -signal.SIGKILL]:
        console.say(f"{join_ranks(killed)} did not end in time and had to be killed (--grace-s {options.grace_s:g})")
    for rank in others:
        error, was_held = rank.output.traceback.error, rank.output.traceback.holding
        # A traceback that the launcher's own signal caused tells why a rank could not save its work.
        interesting = first is None and rank.was_signalled and not error.startswith("KeyboardInterrupt")
        if options.verbose or (interesting and not rank.output.traceback.is_consequence()):
            rank.output.release()
        if rank.failed:
            console.say(f"rank {rank.rank} failed later: {describe_code(rank.code)}" + (f": {error}" if error else ""))
        elif was_held:
            console.say(f"rank {rank.rank} was ended in the middle of a traceback: {error}")
    if ended and first is not None and first.code < 0:
        console.say("with --keep-going the ranks that are left go on, for programs that call group.shrink()")
