"""The outcome of each rank of a test, and the error that shows all outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ferro.errors import FerroError

# Errors that ranks raise when another rank has failed: the first cause only if there is no other error.
_CONSEQUENCES = ("PeerLost", "GroupClosed", "CollectiveTimeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of one rank.

    Attributes:
        rank: the rank.
        result: the function's; None where it returned none.
        error_type: class name of the error that ended the rank, "" if it ended well, "Killed" by a
            signal, "Late" at the deadline, "Exited" if it ended without a report.
        error_text: the traceback, or all that is known in its place.
        exit_code: the process's, None for a simulated rank or after a signal.
        signal: name of the signal that ended the process, or "".
        ended_s: time when the rank failed or ended, in `time.monotonic()` seconds of this host.
        output: the end of what it printed, standard output and error together.
    """

    rank: int
    result: object = None
    error_type: str = ""
    error_text: str = ""
    exit_code: int | None = None
    signal: str = ""
    ended_s: float = 0.0
    output: str = ""

    @property
    def ok(self) -> bool:
        """True when the function returned and the process ended well."""
        return not self.error_type

    def describe(self) -> str:
        """Describe the outcome for people."""
        if self.ok:
            head = f"--- rank {self.rank}: ended well"
        else:
            head = f"--- rank {self.rank}: {self.error_type}\n{self.error_text.rstrip()}"
        return f"{head}\n[its output]\n{self.output.rstrip()}" if self.output.strip() else head


class RanksFailed(FerroError):
    """At least one rank of a test failed; shows every rank's traceback, the first cause first.

    Attributes:
        outcomes: by rank.
    """

    def __init__(self, what: str, outcomes: Sequence[Outcome]) -> None:
        failed = [outcome for outcome in outcomes if not outcome.ok]
        ordered = sorted(outcomes, key=_order)
        first = f"; rank {ordered[0].rank} was first" if failed else ""
        reports = "\n\n".join(outcome.describe() for outcome in ordered)
        super().__init__(f"{what}: {len(failed)} of {len(outcomes)} ranks failed{first}\n{reports}")
        self.outcomes = tuple(outcomes)


def _order(outcome: Outcome) -> tuple[bool, bool, bool, float]:
    """Sort causes first, then their consequences, then ranks that were only late, then ranks that ended well."""
    return (outcome.ok, outcome.error_type == "Late", outcome.error_type in _CONSEQUENCES, outcome.ended_s)
