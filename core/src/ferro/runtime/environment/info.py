"""`LaunchInfo`: who this process is in its job."""

from __future__ import annotations

from dataclasses import dataclass, field

from ferro.runtime.environment.address import Address


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchInfo:
    """Who this process is in its job, and how it finds the others.

    Attributes:
        rank: this process, 0 <= rank < world_size.
        world_size: processes in the job.
        local_rank: this process among those of the job on this host.
        local_world_size: processes of the job on this host.
        launcher: "ferro", "torchrun", "openmpi", "mpich", "slurm", "kubeflow", "arguments"
            (rank or world size came from the caller) or "single" (nobody launched this).
        job: equal on all ranks of this job that run on one host, different from any other job
            there. Also equal between hosts, except where the launcher gives the job no name
            (Hydra's mpiexec; RANK and WORLD_SIZE set by hand without MASTER_ADDR).
        store: address of a store that runs already, or None.
        master: where rank 0 is to host the store, or None.
        master_port_taken: True when torchrun's agent listens on the master's port itself.
        secret: the job's secret as the environment gives it, or None.
        provenance: (attribute, where its value came from), for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    job: str = ""
    store: Address | None = None
    master: Address | None = None
    master_port_taken: bool = False
    secret: bytes | None = field(default=None, repr=False)
    provenance: tuple[tuple[str, str], ...] = ()

    @property
    def lacks_rendezvous_address(self) -> bool:
        """Whether the ranks are on several hosts, and nothing says where to meet."""
        here = self.local_world_size == self.world_size
        return not here and self.store is None and self.master is None

    def describe(self) -> str:
        """Rank, world size and the local pair, each with its source, for messages."""
        return (
            f"rank {self.rank} of {self.world_size} ({self._source('rank', 'world_size')}), "
            f"local rank {self.local_rank} of {self.local_world_size} "
            f"({self._source('local_rank', 'local_world_size')})"
        )

    def _source(self, *names: str) -> str:
        """Where these values came from; the same source twice is named once."""
        sources = dict(self.provenance)
        return "from " + ", ".join(dict.fromkeys(sources.get(name, "nowhere") for name in names))
