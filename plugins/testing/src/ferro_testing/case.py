"""Case: a backend under test, and how to run a function on its ranks."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ferro import ProcessGroup
from ferro.errors import UnsupportedError
from ferro.simulated import simulate
from ferro_testing.differences import check_keys, supported
from ferro_testing.outcome import Outcome, RanksFailed
from ferro_testing.ranks import run_ranks_outcomes
from ferro_testing.samples import DTYPES, known

RUN_S = 60.0


class Runner(Protocol):
    """Runs a function on every rank of a new group."""

    def __call__(
        self,
        function: Callable[..., object],
        world_size: int,
        args: Sequence[object],
        *,
        timeout_s: float,
        deterministic: bool,
    ) -> list[Outcome]:
        """Return the outcome of each rank; a rank that fails must not end the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A backend to check for conformance.

    Attributes:
        backend: its name.
        world_sizes: numbers of ranks to check it with.
        dtypes: names of the element types it carries; without ml_dtypes bfloat16 is left out.
        unsupported: operation or feature that it does not have -> reason; see
            `ferro_testing.differences` for the keys. One check proves the refusals, and the others
            leave them out. UnsupportedError from anything else is a failure.
        timeout_s: deadline of each run.
        init_options: more arguments of `ferro.init`, for ranks that are processes.
        backend_options: the backend's own options, for ranks that are processes.
        launcher: the command that starts the ranks, such as ("mpiexec", "-n", "3"), or a
            function from a number of ranks to it; None for the backend's own, if it has one.
        python: interpreter for the ranks; None for this one.
        runner: how to run its ranks; None for threads with the backend "simulated", else for
            processes in which the backend is installed.

    Raises:
        UsageError: a key of `unsupported` names no operation or feature.
    """

    backend: str
    world_sizes: tuple[int, ...] = (1, 2, 3)
    dtypes: tuple[str, ...] = DTYPES
    unsupported: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = RUN_S
    init_options: Mapping[str, object] = field(default_factory=dict)
    backend_options: Mapping[str, object] = field(default_factory=dict)
    launcher: Sequence[str] | Callable[[int], Sequence[str]] | None = None
    python: str | None = None
    runner: Runner | None = None

    def __post_init__(self) -> None:
        check_keys(self.unsupported)
        object.__setattr__(self, "dtypes", known(self.dtypes))

    @property
    def largest(self) -> int:
        """The largest world size, the only one with which failures are checked, since each needs a run."""
        return max(self.world_sizes)

    @property
    def exceptions(self) -> list[str]:
        """The keys of `unsupported` that name a dtype or a reduction, too."""
        return sorted(key for key in self.unsupported if ":" in key)

    def supports(self, *names: str) -> bool:
        """Say whether none of these operations and features is declared unsupported."""
        return all(supported(self.unsupported, name) for name in names)

    def carried(self, *ops: str) -> list[str]:
        """Return the dtypes with which none of these operations is declared unsupported."""
        return [dtype for dtype in self.dtypes if all(supported(self.unsupported, op, dtype) for op in ops)]

    def outcomes(
        self, function: Callable[..., object], world_size: int, *args: object, deterministic: bool = False
    ) -> list[Outcome]:
        """Run `function(group, *args)` on new ranks; return the outcome of each."""
        runner = self.runner
        if runner is None:
            runner = run_simulated if self.backend == "simulated" else self._run_processes
        return runner(function, world_size, args, timeout_s=self.timeout_s, deterministic=deterministic)

    def verify(
        self, function: Callable[..., object], world_size: int, *args: object, deterministic: bool = False
    ) -> None:
        """Run a function that returns the mistakes it found; raise when any rank found anything.

        Raises:
            RanksFailed: a rank raised an error of its own.
            AssertionError: a rank found something wrong.
        """
        outcomes = self.outcomes(function, world_size, *args, deterministic=deterministic)
        what = f"{function.__name__} on {world_size} ranks of {self.backend}"
        require(what, outcomes)
        found: list[str] = []
        for outcome in outcomes:
            assert isinstance(outcome.result, list), "a check returns a list of findings"
            found += map(str, outcome.result)
        if found:
            raise AssertionError("\n".join([f"{what}:", *found]))

    def verify_all(self, function: Callable[..., object], *args: object, deterministic: bool = False) -> None:
        """`verify` with every world size."""
        for world_size in self.world_sizes:
            self.verify(function, world_size, *args, deterministic=deterministic)

    def _run_processes(
        self,
        function: Callable[..., object],
        world_size: int,
        args: Sequence[object],
        *,
        timeout_s: float,
        deterministic: bool,
    ) -> list[Outcome]:
        options: dict[str, object] = {"deterministic": deterministic, **self.init_options}
        if self.backend_options:
            options["backend_options"] = dict(self.backend_options)
        return run_ranks_outcomes(
            function,
            world_size,
            backend=self.backend,
            args=args,
            timeout_s=timeout_s,
            init_options=options,
            launcher=self.launcher(world_size) if callable(self.launcher) else self.launcher,
            python=self.python,
        )


def require(what: str, outcomes: Sequence[Outcome], lost: Sequence[int] = ()) -> None:
    """Raise when a rank failed, except the ranks that were to be lost.

    Raises:
        RanksFailed: with every rank's traceback, and advice on refusals.
    """
    left = [it for it in outcomes if it.rank not in lost]
    failed = [it for it in left if not it.ok]
    refused = [it.rank for it in failed if it.error_type == UnsupportedError.__name__]
    if refused and len(refused) == len(left):
        what += (
            ": UnsupportedError from what is not declared unsupported. Support it, or declare it "
            "with the reason in Case(unsupported={...})"
        )
    elif refused:
        others = [it.rank for it in left if it.rank not in refused]
        what += (
            f": UnsupportedError on ranks {refused} only, ranks {others} did not refuse. Refuse it "
            "on all ranks alike, or on none: what only some refuse cannot be declared"
        )
    if failed:
        raise RanksFailed(what, outcomes)


def run_simulated(
    function: Callable[..., object], world_size: int, args: Sequence[object], *, timeout_s: float, deterministic: bool
) -> list[Outcome]:
    """Run a function on simulated ranks: a `Runner`."""
    outcomes: dict[int, Outcome] = {}
    lock = threading.Lock()

    def on_rank(group: ProcessGroup) -> None:
        outcome, error = attempt(function, group, args)
        with lock:
            outcomes[group.rank] = outcome
        if error is not None:
            raise error

    try:
        simulate(on_rank, world_size, timeout_s=timeout_s, deterministic=deterministic, run_timeout_s=timeout_s)
    except Exception as error:  # noqa: BLE001 - told by the outcomes, rank by rank
        failure = f"{type(error).__name__}: {error}"
    else:
        failure = "nothing is known of its end"
    with lock:
        return [
            outcomes.get(rank, Outcome(rank=rank, error_type="Late", error_text=failure)) for rank in range(world_size)
        ]


def attempt(
    function: Callable[..., object], group: ProcessGroup, args: Sequence[object]
) -> tuple[Outcome, BaseException | None]:
    """Call a rank's function in this thread; return its outcome, and its error."""
    try:
        return Outcome(rank=group.rank, result=function(group, *args)), None
    except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
        outcome = Outcome(
            rank=group.rank,
            error_type=type(error).__name__,
            error_text="".join(traceback.format_exception(error)),
            ended_s=time.monotonic(),
        )
        return outcome, error
