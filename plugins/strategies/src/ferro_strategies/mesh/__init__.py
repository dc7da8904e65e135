"""DeviceMesh: ranks in rows, columns and further axes, with a process group for each."""

from .mesh import DeviceMesh

__all__ = ["DeviceMesh"]
