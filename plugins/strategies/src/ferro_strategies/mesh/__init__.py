"""DeviceMesh: ranks arranged on named axes, with a process group along each axis."""

from .device_mesh import DeviceMesh

__all__ = ["DeviceMesh"]
