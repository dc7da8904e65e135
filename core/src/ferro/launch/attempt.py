"""One attempt of a job on this node: start the ranks, watch them, end them, and say who failed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from typing import IO

from ferro.errors import FerroError, UsageError
from ferro.launch import report
from ferro.launch.nodes import NodeRendezvous
from ferro.launch.options import LaunchOptions
from ferro.launch.output import Console, RankOutput
from ferro.launch.processes import FORWARDED, STOPPING, SUSPENDING, Supervisor, collected_signals, take_signals
from ferro.launch.report import Failure, RankProcess, join_ranks
from ferro.launch.terminal import TerminalInput
from ferro.launch.writer import BackgroundWriter
from ferro.runtime.environment import Address, LaunchInfo, child_environment

# A rank that lost a peer may end before the peer does: the launcher waits so long for the peer's own error.
_PEER_ERROR_S = 1.0
# GNU timeout signals its child twice at once: signals so close together are one request to end.
_SAME_REQUEST_S = 0.02
_WAIT_S = 0.5
_POLL_S = 0.05
_QUICK_END_S = 1.0  # ranks that take longer to end do not delay the report on the one that failed,
_AGREEMENT_S = 3.0  # nor do other nodes that take longer to tell their failures
_NEXT_NOTICE_S = 30.0


@dataclass
class Attempt:
    """One attempt of a job on this node; `run` is called once."""

    options: LaunchOptions
    number: int
    console: Console
    writers: tuple[BackgroundWriter, BackgroundWriter]  # the console's, to stdout and stderr
    endpoint: tuple[Address, Address, bytes]  # the store's address, that for torch.distributed, the store's secret
    nodes: NodeRendezvous | None
    trace: str | None  # the directory for the ranks' traces
    ranks: list[RankProcess] = field(default_factory=list)
    lost: list[RankProcess] = field(default_factory=list)  # those that failed while the others went on
    stops: list[signal.Signals] = field(default_factory=list)  # the requests to end the job
    stopped_by: signal.Signals | None = None  # the request that came before any failure
    ending: bool = False  # the ranks have been told to end
    started: float = 0.0

    def run(self) -> Failure | None:
        """Run the ranks until all have ended; return the first failure in the job, if any."""
        self.started = time.monotonic()
        for writer in self.writers:
            writer.ending = False
        with contextlib.ExitStack() as resources, collected_signals() as signals:
            with Supervisor(wake=signals, adopt_orphans=True) as supervisor:
                self._start(supervisor, resources)
                self._watch(supervisor, signals)
            first, failure = self._find_failure()
            agreed = failure
            try:
                if self.nodes is not None:
                    agreed = self._agree(self.nodes, failure, signals)
            finally:  # this node's failures are reported even if node 0 is gone
                if agreed is not None:
                    here = failure is not None and agreed.what.endswith(failure.what)
                    report.show_report(self.console, self.ranks, first if here else None, agreed, self.options)
        return agreed

    def _find_failure(self) -> tuple[RankProcess | None, Failure | None]:
        """Say whether the attempt failed on this node: the rank that failed first, if any, and the failure."""
        first = report.first_failure(self.ranks)
        if self.stopped_by is not None:
            return None, self._describe_stop(self.stopped_by)
        if first is None or self._survivors_ended_well():
            return None, None
        failure = report.describe_failure(first, self.started, alone=self.options.world_size == 1)
        return first, failure if self.nodes is not None else report.name_early_ranks(failure, self._early_ends())

    def _describe_stop(self, signum: signal.Signals) -> Failure:
        launcher = "the launcher" + ("" if self.nodes is None else f" of node {self.options.node_rank}")
        what = f"{launcher} was stopped by {signum.name}"
        if signum == signal.SIGPIPE:
            what = f"nobody reads the output of {launcher} any more ({signum.name})"
        return Failure(what=what, status=128 + signum, after_s=time.monotonic() - self.started, restart=False)

    def _early_ends(self) -> dict[int, float]:
        """Tell which ranks have ended by themselves with exit code 0, and after how many seconds."""
        ends = {rank.rank: rank.process.ended_at for rank in self.ranks if rank.code == 0 and not rank.was_signalled}
        return {rank: ended_at - self.started for rank, ended_at in ends.items() if ended_at is not None}

    def _survivors_ended_well(self) -> bool:
        """Say whether ranks were lost, and others went on and ended with exit code 0 after that."""
        if not self.lost:
            return False
        last = max(rank.process.ended_at or 0.0 for rank in self.lost)
        well = [rank for rank in self.ranks if rank.code == 0 and (rank.process.ended_at or 0.0) > last]
        if well:
            self.console.say(f"lost {join_ranks(self.lost)}; {join_ranks(well)} went on and ended well.")
        return bool(well)

    def _agree(self, nodes: NodeRendezvous, failure: Failure | None, signals: socket.socket) -> Failure | None:
        """Wait until all nodes have ended the attempt, or a signal; return the first failure of the job."""
        answers: list[Failure | FerroError | None] = []

        def ask() -> None:
            try:
                answers.append(nodes.first_failure(self.number, failure, self._early_ends()))
            except FerroError as error:
                answers.append(error)

        # A thread asks, so that neither a node nor a network that is down makes the launcher deaf to signals.
        asking = threading.Thread(target=ask, name="ferro-run-agreement", daemon=True)
        asking.start()
        stops, notice_at = len(self.stops), time.monotonic() + _AGREEMENT_S
        while asking.is_alive():
            asking.join(_POLL_S)
            self._handle_events(None, signals)
            if len(self.stops) > stops:
                return replace(failure or self._describe_stop(self.stops[-1]), restart=False)
            if time.monotonic() > notice_at and not answers:
                if (first := report.first_failure(self.ranks)) is not None:
                    first.output.release()
                self.console.say(nodes.describe_unfinished(self.number))
                notice_at += _NEXT_NOTICE_S
        answer = answers[0] if answers else failure
        if isinstance(answer, FerroError):
            raise answer
        return answer

    def _start(self, supervisor: Supervisor, resources: contextlib.ExitStack) -> None:
        options = self.options
        store, master, secret = self.endpoint
        for local_rank in range(options.nproc_per_node):
            info = LaunchInfo(
                rank=options.node_rank * options.nproc_per_node + local_rank,
                world_size=options.world_size,
                local_rank=local_rank,
                local_world_size=options.nproc_per_node,
                launcher="ferro",
                store=store,
                master=master,
                secret=secret,
            )
            env = child_environment(info, restart=self.number, trace=self.trace, timeout_s=options.timeout_s)
            output = RankOutput(self.console, info.rank, self._open_logs(info.rank, resources))
            terminal = TerminalInput(self.console.forget_lines) if info.rank == 0 and os.isatty(0) else None
            stdin = 0 if info.rank == 0 else subprocess.DEVNULL
            try:
                process = supervisor.start(
                    [sys.executable, *options.python_arguments()],
                    env=env,
                    stdin=stdin if terminal is None else terminal.reader,
                    stdout=output.out.receive,
                    stderr=output.err.receive,
                    stdout_room=self.writers[0].has_room,
                    stderr_room=self.writers[1].has_room,
                    on_end=output.finish,
                    dies_with_parent=True,
                )
            except OSError as exc:
                raise FerroError(
                    f"rank {info.rank} could not be started: {exc}; ask for fewer ranks, or "
                    "raise the limit on processes or open files (ulimit)"
                ) from exc
            if terminal is not None:
                resources.enter_context(terminal)
            self.ranks.append(RankProcess(info.rank, process, output))

    def _open_logs(self, rank: int, resources: contextlib.ExitStack) -> list[IO[bytes]]:
        """Open a rank's logs, if there are to be any; later attempts append to them."""
        directory, mode = self.options.log_dir, "ab" if self.number else "wb"
        if directory is None:
            return []
        paths = [directory / f"rank{rank}.{kind}" for kind in ("out", "err")]
        try:
            return [resources.enter_context(path.open(mode, buffering=0)) for path in paths]
        except OSError as exc:
            raise UsageError(f"--log-dir {directory}: {exc}; name a directory to write to") from exc

    def _watch(self, supervisor: Supervisor, signals: socket.socket) -> None:
        """Wait until the ranks have ended, or end them."""
        signum = signal.SIGTERM
        while supervisor.running():
            supervisor.wait(self._wait_s())
            self._handle_events(supervisor, signals)
            if self.stops:
                self.stopped_by = self.stops[0]
                signum = signal.SIGTERM if self.stopped_by == signal.SIGPIPE else self.stopped_by
                break
            if self.nodes is not None and self.nodes.stopped(self.number):
                break
            failed = [rank for rank in self.ranks if rank.failed]
            if self.options.keep_going:
                self._go_on_without([rank for rank in failed if rank not in self.lost])
            elif failed:
                only_lost_peers = all(rank.output.traceback.is_consequence() for rank in failed)
                since = min(rank.process.ended_at or 0.0 for rank in failed)
                if not only_lost_peers or time.monotonic() > since + _PEER_ERROR_S:
                    break
        began, self.ending = time.monotonic(), True
        for writer in self.writers:
            writer.ending = True
        if self.nodes is not None and supervisor.running() and (self.stops or not self.options.keep_going):
            self.nodes.request_stop()
        told: list[bool] = []

        def hurry() -> bool:
            self._handle_events(supervisor, signals)
            if supervisor.running() and not told and time.monotonic() > began + _QUICK_END_S:
                told.append(True)
                self._tell_ending()
            return len(self.stops) > 1

        supervisor.end(signum, grace_s=self.options.grace_s, hurry=hurry)

    def _go_on_without(self, failed: list[RankProcess]) -> None:
        """Report ranks that failed while the others go on."""
        for rank in failed:
            self.lost.append(rank)
            rank.output.release()
            self.console.say(
                f"lost rank {rank.rank}: {report.describe_code(rank.code)}; the others go on (--keep-going)"
            )

    def _tell_ending(self) -> None:
        """Tell the user why the ranks are ended, and that some take their time; show the first failure at once."""
        busy = join_ranks([rank for rank in self.ranks if rank.process.ended_at is None])
        why = "something failed on another node"
        if self.stopped_by is not None:
            why = self._describe_stop(self.stopped_by).what
        elif (first := report.first_failure(self.ranks)) is not None:
            first.output.release()
            why = report.describe_failure(first, self.started, alone=self.options.world_size == 1).what
        grace = f"{self.options.grace_s:g} s (--grace-s)"
        self.console.say(f"{why}; waiting up to {grace} for {busy} to end, or for a second signal")

    def _wait_s(self) -> float:
        """Compute how long to wait for events until the ranks' output has to be looked after."""
        if not self._has_room():
            return _POLL_S
        due = [due for rank in self.ranks if rank.process.ended_at is None and (due := rank.output.due()) is not None]
        return min([_WAIT_S, *(max(it - time.monotonic(), 0.0) for it in due)])

    def _has_room(self) -> bool:
        return all(writer.has_room() for writer in self.writers)

    def _handle_events(self, supervisor: Supervisor | None, signals: socket.socket) -> None:
        """Show output that is due; forward signals, or note them as requests to end the job."""
        if self._has_room():
            for rank in self.ranks:
                if rank.process.ended_at is None:
                    rank.output.release_due()
        for writer, name in zip(self.writers, ("stdout", "stderr"), strict=True):
            if writer.reader_left:
                if name == "stdout" and not self.stops and not self.ending:
                    self.stops.append(signal.SIGPIPE)
            elif writer.error is not None and not writer.error_told:
                writer.error_told = True
                self.console.say(f"{name} cannot be written: {writer.error.strerror}; output is lost, the job goes on")
        received = take_signals(signals)
        if not self.stops and any(signum in STOPPING for signum in received):
            time.sleep(_SAME_REQUEST_S)
            received += take_signals(signals)
        self.stops += [signum for signum in received if signum in STOPPING][:1]
        for child in supervisor.running() if supervisor is not None else ():
            for signum in received:
                if signum in FORWARDED:
                    child.send_signal(signum)
        if SUSPENDING in received and supervisor is not None:
            supervisor.suspend()
