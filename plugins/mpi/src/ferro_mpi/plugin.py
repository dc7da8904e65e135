"""What this distribution offers: the MPI backend. Importing it starts nothing."""

from collections.abc import Sequence
from types import ModuleType

from ferro import Availability, Backend, BackendConfig, BackendInfo, BackendUnavailable, hookimpl


def _world() -> ModuleType:
    """Return the module that starts MPI."""
    try:
        from ferro_mpi import world
    except (ImportError, RuntimeError) as error:  # the latter when mpi4py finds no libmpi
        from ferro_mpi.installed import HINT

        raise BackendUnavailable("mpi", f"mpi4py cannot load MPI: {error}", HINT) from error
    return world


def _probe() -> Availability:
    from ferro_mpi.installed import probe

    return probe()


def _create(config: BackendConfig) -> Backend:
    backend: Backend = _world().connect(config)
    return backend


def _introduce(rank: int, world_size: int, message: bytes | None, deadline: float) -> bytes:
    told: bytes = _world().introduce(rank, world_size, message, deadline)
    return told


def _launcher(world_size: int) -> Sequence[str]:
    from ferro_mpi.installed import launcher

    return launcher(world_size)


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer mpi, as the default under mpiexec."""
    return (
        BackendInfo(
            name="mpi",
            summary="the native collectives of Open MPI, MPICH and their kin, through mpi4py",
            probe=_probe,
            create=_create,
            default_under=("openmpi", "mpich"),
            launcher=_launcher,
            introduce=_introduce,
        ),
    )
