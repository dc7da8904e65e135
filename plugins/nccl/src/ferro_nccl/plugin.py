"""The hooks of this distribution, which offer the NCCL backend. Importing this uses no GPU."""

from __future__ import annotations

from collections.abc import Sequence

from ferro import Availability, Backend, BackendConfig, BackendInfo, BackendUnavailable, hookimpl
from ferro.types import Device


def _probe() -> Availability:
    from ferro_nccl.probe import probe  # here, because it imports importlib.metadata

    return probe()


def _create(config: BackendConfig) -> Backend:
    found = _probe()
    if not found.ok:
        raise BackendUnavailable("nccl", found.reason, found.hint)
    from ferro_nccl.backend import NcclBackend
    from ferro_nccl.cupy_library import CupyLibrary

    return NcclBackend.connect(config, CupyLibrary())


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer nccl, which is not the default under any launcher."""
    return (
        BackendInfo(
            name="nccl",
            summary="collectives on CuPy arrays between NVIDIA GPUs",
            probe=_probe,
            create=_create,
            devices=(Device.CUDA, Device.CPU),
        ),
    )
