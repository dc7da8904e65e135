"""The verdict of each conformance check on a backend whose author has declared no gaps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from ferro.errors import FerroError
from ferro_testing import conformance as kit
from ferro_testing.case import Case
from ferro_testing.command.bundle import Check, bundled
from ferro_testing.differences import TRANSFERS
from ferro_testing.killing import DeathNoticedLate, JobEnded
from ferro_testing.outcome import Outcome, RanksFailed

# Feature in the tables -> the check that decides it.
FEATURES: dict[str, Check] = {
    "functions": kit.check_reduction_functions,
    "uneven": kit.check_uneven,
    "objects": kit.check_objects,
    "async": kit.check_async,
    "split": kit.check_groups,
    "subgroup": kit.check_groups,
    "overlapping": kit.check_overlapping_groups,
    "transfers": kit.check_transfers,
    "tags": kit.check_tags,
    "equal_bits": kit.check_equal_bits,
    "deterministic": kit.check_deterministic,
    "mismatch": kit.check_mismatch,
    "timeout": kit.check_timeout,
    "abort": kit.check_abort,
    "lost_peer": kit.check_lost_peer,
    "shrink": kit.check_shrink,
}
# Checks that end their group, or need a group with other options.
_NEED_OWN_GROUP = (
    kit.check_deterministic,
    kit.check_mismatch,
    kit.check_timeout,
    kit.check_send_deadline,
    kit.check_abort,
    kit.check_lost_peer,
    kit.check_shrink,
)
_ENDED_BY_LAUNCHER = "the launcher ends the whole job when a rank dies"
_TOLD_LATE = "a dead rank is told only by the deadline"
_KILLED = ("Killed", "RankKilled")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckVerdict:
    """The verdict of one check.

    Attributes:
        name: the check's.
        status: "ok"; "refused" by UnsupportedError on every rank, or lacking a feature that a
            backend may lack without refusing; "wrong"; "skipped" when an operation that it needs is refused.
        text: the reason for a status other than "ok".
        seconds: how long it took; 0.0 where several checks ran at once.
    """

    name: str
    status: Literal["ok", "refused", "wrong", "skipped"]
    text: str = ""
    seconds: float = 0.0


def judge(case: Case, *, launched: bool, quick: bool, told: Callable[[CheckVerdict], None]) -> dict[str, CheckVerdict]:
    """Run the checks; return name -> verdict.

    Args:
        case: the backend, with the gaps that were found.
        launched: its ranks are started by a launcher of its own.
        quick: run only the checks that the tables need, most of them at once.
        told: is called with each verdict at once.
    """
    case = _without_transfers(case)
    checks = list(dict.fromkeys(FEATURES.values())) if quick else list(kit.CHECKS)
    together = [check for check in checks if check not in _NEED_OWN_GROUP] if quick else []
    cases = bundled(together, case, case.largest)
    verdicts: dict[str, CheckVerdict] = {}
    for check in checks:
        few = quick and check is kit.check_mismatch  # each kind needs a run of the ranks
        chosen = partial(kit.check_mismatch, kinds=("op", "transfer")) if few else check
        verdict = _judge(check.__name__, chosen, cases.get(check, case), launched)
        if check in cases and verdict.status in ("refused", "wrong"):  # maybe only since another check broke the group
            verdict = _judge(check.__name__, check, case, launched)
        verdicts[verdict.name] = verdict
        told(verdict)
    return verdicts


def _without_transfers(case: Case) -> Case:
    """Declare `send` and `recv` if `sendrecv` is declared, which was tried in place of all three."""
    reason = case.unsupported.get("sendrecv")
    if reason is None:
        return case
    return replace(case, unsupported={**dict.fromkeys(TRANSFERS, reason), **case.unsupported})


def _judge(name: str, check: Check, case: Case, launched: bool) -> CheckVerdict:
    runs = 0

    def runner(
        function: Callable[..., object],
        world_size: int,
        args: Sequence[object],
        *,
        timeout_s: float,
        deterministic: bool,
    ) -> list[Outcome]:
        nonlocal runs
        runs += 1
        return case.outcomes(function, world_size, *args, deterministic=deterministic)

    started = time.monotonic()
    text = ""
    status: Literal["ok", "refused", "wrong", "skipped"] = "wrong"
    try:
        check(replace(case, runner=runner))
        status = "ok" if runs else "skipped"
    except JobEnded as error:
        status, text = ("refused", _ENDED_BY_LAUNCHER) if launched else ("wrong", str(error))
    except RanksFailed as error:
        text = refusal(error.outcomes)
        status, text = ("refused", text) if text else ("wrong", str(error))
    except DeathNoticedLate:
        status, text = "refused", _TOLD_LATE
    except (AssertionError, FerroError) as error:
        text = str(error)
    return CheckVerdict(name=name, status=status, text=text, seconds=time.monotonic() - started)


def refusal(outcomes: Sequence[Outcome]) -> str:
    """Return the reason with which all ranks raised UnsupportedError; "" if any did not raise it.

    Ranks that were killed on purpose are left out.
    """
    left = [outcome for outcome in outcomes if outcome.error_type not in _KILLED]
    if not left or any(outcome.error_type != "UnsupportedError" for outcome in left):
        return ""
    words = left[0].error_text.rpartition("UnsupportedError: ")[2].strip()
    return words.splitlines()[0].strip() if words else "UnsupportedError without a word"
