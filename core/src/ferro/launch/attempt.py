"""One attempt: start this node's ranks, watch them, end them, and say who failed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from ferro.errors import FerroError
from ferro.launch.contact import Contact
from ferro.launch.crew import Crew
from ferro.launch.guard import starter_command
from ferro.launch.nodes import Meeting
from ferro.launch.options import LaunchOptions
from ferro.launch.output import Console, RankOutput
from ferro.launch.report import Failure, describe_failure, first_failure, show_failure, show_others
from ferro.launch.signals import SignalPipe
from ferro.launch.worker import Worker
from ferro.runtime.environment import LaunchInfo, child_environment

# A rank that lost a peer may end before that peer does: time for it to say what happened.
_CULPRIT_S = 1.0


class Attempt:
    """One attempt of a job on this node."""

    def __init__(
        self,
        options: LaunchOptions,
        number: int,
        *,
        console: Console,
        contact: Contact,
        meeting: Meeting | None,
        trace: Path | None,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            options: the command line.
            number: restarts before this attempt.
            console: where output goes.
            contact: what ranks are told to find each other.
            meeting: the other nodes' launchers, or None.
            trace: directory for trace parts, or None.
        """
        self._options = options
        self._number = number
        self._console = console
        self._contact = contact
        self._meeting = meeting
        self._trace = trace
        self._started = 0.0

    def run(self) -> Failure | None:
        """Run the ranks until all have ended; return what failed first in the job, if anything.

        Raises:
            FerroError: a process could not be started.
            RendezvousError: node 0's launcher is gone; this node's ranks were ended.
        """
        self._started = time.monotonic()
        with SignalPipe() as signals, Crew(signals) as crew:
            self._start(crew)
            stopped_by = self._watch(crew)
        first = first_failure(crew.workers)
        failure = None
        if stopped_by is not None:
            first, failure = None, self._stopped(stopped_by)
        elif first is not None:
            failure = describe_failure(first, self._started, alone=self._options.world_size == 1)
        return self._conclude(crew.workers, first, failure)

    def _start(self, crew: Crew) -> None:
        options = self._options
        command = starter_command(options.python_arguments())
        for local_rank in range(options.nproc_per_node):
            info = LaunchInfo(
                rank=options.node_rank * options.nproc_per_node + local_rank,
                world_size=options.world_size,
                local_rank=local_rank,
                local_world_size=options.nproc_per_node,
                launcher="ferro",
                store=self._contact.store,
                master=self._contact.master,
                secret=self._contact.secret,
            )
            env = child_environment(
                info,
                restart=self._number,
                trace=None if self._trace is None else str(self._trace),
                timeout_s=options.timeout_s,
            )
            output = RankOutput(self._console, info.rank, log_dir=options.log_dir, append=self._number > 0)
            try:
                crew.add(Worker(info.rank, command, env, output))
            except OSError as exc:
                output.close()
                raise FerroError(
                    f"rank {info.rank} could not be started: {exc}; ask for fewer ranks, or "
                    "raise the limit on processes or open files (ulimit)"
                ) from exc
        crew.guard()

    def _watch(self, crew: Crew) -> signal.Signals | None:
        """Wait until the ranks are done or to be ended; return the signal that stopped us."""
        while crew.running():
            if signals := crew.watch():
                crew.end(signals[0])
                return signals[0]
            if self._meeting is not None and self._meeting.stopped(self._number):
                break
            failed = crew.failed()
            if failed and not _culprit_may_follow(failed):
                break
        crew.end(signal.SIGTERM)
        return None

    def _stopped(self, signum: signal.Signals) -> Failure:
        """The launcher itself was told to stop."""
        node = "" if self._meeting is None else f" of node {self._options.node_rank}"
        return Failure(
            what=f"the launcher{node} was stopped by {signum.name}",
            status=128 + signum,
            after_s=time.monotonic() - self._started,
            restart=False,
        )

    def _conclude(self, workers: list[Worker], first: Worker | None, failure: Failure | None) -> Failure | None:
        """Agree with the other nodes on what failed first, and print the report."""
        verdict = failure
        try:
            if self._meeting is not None:
                verdict = self._meeting.conclude(self._number, failure)
        finally:  # with node 0 gone, too, what happened here is to be told
            if verdict is not None:
                local = first if verdict == failure else None
                show_failure(self._console, workers, local, verdict)
                others = [worker for worker in workers if worker is not local]
                show_others(self._console, others, verbose=self._options.verbose)
        return verdict


def _culprit_may_follow(failed: list[Worker]) -> bool:
    """Whether all who failed put it down to a peer, and that only just now."""
    blameless = all(worker.output.traceback.is_consequence() for worker in failed)
    return blameless and time.monotonic() < min(w.ended_at for w in failed) + _CULPRIT_S
