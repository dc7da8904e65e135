"""The check whether NCCL can be used, which takes a few milliseconds and does not import CuPy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from ferro.types import Availability

_INSTALL = (
    "Install ferro's extra nccl (CUDA 13: cupy-cuda13x and nvidia-nccl-cu13) or nccl-cuda12 "
    "(CUDA 12: cupy-cuda12x and nvidia-nccl-cu12), never both."
)
_NCCL_WHEELS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemQueries:
    """The probe's questions to the system, which tests replace.

    Attributes:
        has_module: returns True if a module could be imported, without importing it.
        has_library: returns True if a shared library can be loaded.
        gpus: counts the GPUs that the driver knows; None when the driver cannot be asked.
        version: gets the version of a distribution; None when it is not installed.
    """

    has_module: Callable[[str], bool]
    has_library: Callable[[str], bool]
    gpus: Callable[[], int | None]
    version: Callable[[str], str | None]


def probe(system: SystemQueries | None = None) -> Availability:
    """Look for CuPy, NCCL, the driver and a GPU, in this order; name the first that is missing."""
    system = system or _SYSTEM
    # The probe does not look for cupy.cuda.nccl: to find a submodule, Python imports its parents.
    if not system.has_module("cupy_backends"):
        return Availability(ok=False, reason="CuPy is not installed", hint=_INSTALL)
    if not system.has_module("nvidia.nccl") and not system.has_library("libnccl.so.2"):
        return Availability(
            ok=False,
            reason="there is no NCCL: neither a wheel nvidia-nccl-cu13 or -cu12, nor libnccl.so.2",
            hint=_INSTALL,
        )
    if not system.has_library("libcuda.so.1"):
        return Availability(
            ok=False,
            reason="there is no NVIDIA driver: libcuda.so.1 cannot be loaded",
            hint="Run on a host with an NVIDIA GPU; in a container, start it with GPU access "
            "(docker run --gpus all). Without a GPU use gloo or mpi.",
        )
    gpus = system.gpus()
    if gpus == 0:
        return Availability(
            ok=False,
            reason="the NVIDIA driver knows no GPU",
            hint="Check with nvidia-smi. Without a GPU use gloo or mpi.",
        )
    found = "CuPy and NCCL" if gpus is None else f"CuPy, NCCL and {gpus} GPU(s)"
    return Availability(ok=True, reason=found, version=_first(map(system.version, _NCCL_WHEELS)))


def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # its parent is absent, or is not a package
        return False


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _gpus() -> int | None:
    """Count the GPUs by NVML, because CUDA would take memory on every GPU."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
        count = ctypes.c_uint(0)
        failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return None if failed else count.value


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first(versions: Sequence[str | None] | map[str | None]) -> str | None:
    return next((version for version in versions if version is not None), None)


_SYSTEM = SystemQueries(has_module=_has_module, has_library=_has_library, gpus=_gpus, version=_version)
