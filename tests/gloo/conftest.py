"""gloo ranks as threads of this process: real sockets and memory, quick to start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from ferro import Backend, BackendConfig, ProcessGroup
from ferro.collectives import Choice
from ferro.group.group_info import GroupInfo
from ferro.rendezvous import MemoryStore
from ferro_gloo.backend import GlooBackend
from ferro_testing.case import attempt
from ferro_testing.outcome import Outcome

SECRET = b"a secret of thirty-two characters"


@dataclass
class Ranks:
    """Starts ranks of one world, each in a thread, and collects their results and errors."""

    world_size: int
    host: str = "127.0.0.1"
    timeout_s: float = 10.0
    secret: bytes = SECRET
    connect: Callable[[BackendConfig], Backend] = GlooBackend.connect
    store: MemoryStore = field(default_factory=MemoryStore)
    results: dict[int, object] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(
        self, function: Callable[[ProcessGroup], object], ranks: range | None = None, secret: bytes | None = None
    ) -> None:
        """Start some ranks, by default all."""
        for rank in ranks if ranks is not None else range(self.world_size):
            thread = threading.Thread(target=self._run, args=(rank, function, secret or self.secret), daemon=True)
            self.threads.append(thread)
            thread.start()

    def join(self) -> dict[int, object]:
        """Wait for all; return results by rank."""
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank did not end"
        return self.results

    def port(self, rank: int) -> int:
        """Wait until a rank listens; return its port."""
        deadline = time.monotonic() + self.timeout_s
        return int(self.store.get(f"gloo/port/{rank}", deadline=deadline))

    def _run(self, rank: int, function: Callable[[ProcessGroup], object], secret: bytes) -> None:
        try:
            config = BackendConfig(
                rank=rank,
                world_size=self.world_size,
                store=self.store.prefix("gloo"),
                secret=secret,
                addresses=(self.host,) * self.world_size,
                timeout_s=self.timeout_s,
            )
            members = GroupInfo(
                name="world",
                backend_name="gloo",
                global_ranks=tuple(range(self.world_size)),
                hosts=("here",) * self.world_size,
                job_store=self.store,
                store=self.store.prefix("group/0"),
                timeout_s=self.timeout_s,
            )
            with ProcessGroup(self.connect(config), members) as group:
                self.results[rank] = function(group)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.errors[rank] = error


def outcomes_in_threads(
    connect: Callable[[BackendConfig], Backend],
    function: Callable[..., object],
    world_size: int,
    args: Sequence[object],
    *,
    timeout_s: float,
    deterministic: bool,
) -> list[Outcome]:
    """Run a function on ranks that are threads; return their outcomes, as a case's runner does."""
    outcomes: dict[int, Outcome] = {}

    def on_rank(group: ProcessGroup) -> None:
        outcomes[group.rank], error = attempt(function, group, args)
        if error is not None:
            raise error

    def connect_with_choice(config: BackendConfig) -> Backend:
        return connect(replace(config, choice=Choice(deterministic=deterministic)))

    ranks = Ranks(world_size, timeout_s=timeout_s, connect=connect_with_choice)
    ranks.start(on_rank)
    ranks.join()
    return [
        outcomes.get(rank) or Outcome(rank=rank, error_text=repr(ranks.errors.get(rank))) for rank in range(world_size)
    ]


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., Ranks]]:
    """A factory of `Ranks` whose threads have all ended when the test has."""
    made: list[Ranks] = []

    def make(world_size: int, **options: object) -> Ranks:
        made.append(Ranks(world_size, **options))
        return made[-1]

    yield make
    for ranks in made:
        ranks.join()


@pytest.fixture
def on_ranks(start_ranks: Callable[..., Ranks]) -> Callable[..., dict[int, object]]:
    """Run a function on n ranks; return the results, raise the first error."""

    def run(world_size: int, function: Callable[[ProcessGroup], object], **options: object):
        ranks = start_ranks(world_size, **options)
        ranks.start(function)
        ranks.join()
        for error in ranks.errors.values():
            raise error
        return ranks.results

    return run
