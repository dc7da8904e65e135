"""The hooks of this distribution, which offer the MPI backend. Importing this starts nothing."""

from collections.abc import Sequence
from types import ModuleType

from ferro import Availability, Backend, BackendConfig, BackendInfo, BackendUnavailable, hookimpl


def _world() -> ModuleType:
    """Import the module that starts MPI."""
    try:
        from ferro_mpi import world
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no libmpi
        from ferro_mpi.probe import HINT

        raise BackendUnavailable("mpi", f"mpi4py cannot load MPI: {error}", HINT) from error
    return world


def _probe() -> Availability:
    from ferro_mpi.probe import probe

    return probe()


def _create(config: BackendConfig) -> Backend:
    backend: Backend = _world().connect(config)
    return backend


def _broadcast_bootstrap(rank: int, world_size: int, message: bytes | None, deadline: float) -> bytes:
    received: bytes = _world().broadcast_bootstrap(rank, world_size, message, deadline)
    return received


def _launcher(world_size: int) -> Sequence[str]:
    from ferro_mpi.probe import launcher_command

    return launcher_command(world_size)


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer mpi as the default backend under mpiexec."""
    return (
        BackendInfo(
            name="mpi",
            summary="the native collectives of Open MPI, MPICH and their kin, through mpi4py",
            probe=_probe,
            create=_create,
            default_under=("openmpi", "mpich"),
            launcher=_launcher,
            bootstrap_broadcast=_broadcast_bootstrap,
        ),
    )
