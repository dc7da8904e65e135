"""nccl ranks as threads of this process, each with a GPU of a stand-in for CuPy and NCCL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from ferro import BackendConfig, ProcessGroup
from ferro.collectives import Choice
from ferro.group.group_info import GroupInfo
from ferro.rendezvous import MemoryStore
from ferro.simulated import RankKilled
from ferro.types import Device
from ferro_nccl.backend import NcclBackend

from .standin import Machine

JOIN_S = 30.0


@dataclass
class Ranks:
    """Runs a function on the ranks of one world, each a thread with a GPU of its own."""

    machine: Machine
    world_size: int
    timeout_s: float = 10.0
    deterministic: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)  # ranks that died, as a job's store would tell
    store: MemoryStore = field(default_factory=MemoryStore)
    results: dict[int, object] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self, function: Callable[[ProcessGroup], object], ranks=None) -> None:
        """Start some ranks, by default all."""
        for rank in range(self.world_size) if ranks is None else ranks:
            thread = threading.Thread(target=self._run, args=(rank, function), daemon=True)
            self.threads.append(thread)
            thread.start()

    def join(self) -> dict[int, object]:
        """Wait for all; return results by rank."""
        for thread in self.threads:
            thread.join(JOIN_S)
            assert not thread.is_alive(), "a rank did not end"
        return self.results

    def config(self, rank: int) -> BackendConfig:
        """Make the configuration of a rank's backend."""
        return BackendConfig(
            rank=rank,
            world_size=self.world_size,
            store=self.store.prefix("group/0"),
            timeout_s=self.timeout_s,
            choice=Choice(deterministic=self.deterministic),
            local_rank=rank,
            lost=lambda: frozenset(self.lost),
            options=self.options,
        )

    def _run(self, rank: int, function: Callable[[ProcessGroup], object]) -> None:
        try:
            members = GroupInfo(
                name="world",
                backend_name="nccl",
                global_ranks=tuple(range(self.world_size)),
                hosts=("here",) * self.world_size,
                job_store=self.store,
                store=self.store.prefix("group/0"),
                local_rank=rank,
                timeout_s=self.timeout_s,
                devices=(Device.CUDA, Device.CPU),
            )
            backend = NcclBackend.connect(self.config(rank), self.machine.library())
            with ProcessGroup(backend, members) as group:
                self.results[rank] = function(group)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.errors[rank] = error
            if isinstance(error, RankKilled):
                self.lost.add(rank)


@pytest.fixture
def machine(monkeypatch):
    """A machine of four GPUs, on which nothing may have gone wrong by the end."""
    made = Machine()
    made.install(monkeypatch)
    yield made
    made.close()
    assert made.faults == []


@pytest.fixture
def on_ranks(machine):
    """Run a function on n ranks; return the results by rank, raise the first error."""

    def run(world_size, function, **options):
        ranks = Ranks(machine, world_size, **options)
        ranks.start(function)
        ranks.join()
        for error in ranks.errors.values():
            raise error
        return ranks.results

    return run
