"""Routes: the part of a hybrid backend that serves the arrays on each device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ferro import Backend, Device, UsageError


@dataclass(frozen=True, slots=True)
class Routes:
    """The parts of one rank's hybrid backend.

    Attributes:
        collectives: device -> the part that carries out collectives on its arrays; the CPU is first.
        transfers: device -> the part that sends and receives its arrays.
        p2p: the part for barriers, and for transfers of all arrays that it supports.
    """

    collectives: Mapping[Device, Backend]
    transfers: Mapping[Device, Backend]
    p2p: Backend

    @classmethod
    def from_parts(
        cls, collectives: Backend | Mapping[Device, Backend] | Mapping[str, Backend], p2p: Backend
    ) -> Routes:
        """Choose a part for each device and kind of operation, from the arguments of `HybridBackend`.

        Raises:
            UsageError: the parts are of different groups, or a part does not support its device.
        """
        if Device.CPU not in supported_devices(p2p):
            raise UsageError(
                f"p2p is {_name(p2p)}, which takes arrays on {', '.join(supported_devices(p2p))}: it carries "
                "barriers as well, and must take arrays on cpu"
            )
        if isinstance(collectives, Backend):
            given = dict.fromkeys(supported_devices(collectives), collectives)
        else:
            given = {device_from_name(key): part for key, part in collectives.items()}
        for device, part in given.items():
            _check_fits(device, part, p2p)
        by_device = {Device.CPU: given.pop(Device.CPU, p2p), **given}
        transfers = {d: p2p if d in supported_devices(p2p) else part for d, part in by_device.items()}
        return cls(MappingProxyType(by_device), MappingProxyType(transfers), p2p)

    @property
    def parts(self) -> tuple[Backend, ...]:
        """Every part once, in the same order on all ranks."""
        return tuple(dict.fromkeys((self.p2p, *self.collectives.values())))

    @property
    def streams(self) -> tuple[Device, ...]:
        """The devices on which some part only launches operations."""
        return tuple(
            device
            for device, part in self.collectives.items()
            if device in part.streams or device in self.transfers[device].streams
        )


def supported_devices(part: Backend) -> tuple[Device, ...]:
    """List the devices whose arrays a backend takes: `devices` if set, else `streams` if any, else the CPU."""
    return part.devices if part.devices is not None else part.streams or (Device.CPU,)


def device_from_name(name: str) -> Device:
    """Return the device of this name.

    Raises:
        UsageError: there is no such device.
    """
    try:
        return Device(name)
    except ValueError:
        raise UsageError(f"there is no device {name!r}: devices are {', '.join(Device)}") from None


def _check_fits(device: Device, part: Backend, p2p: Backend) -> None:
    if (part.rank, part.world_size) != (p2p.rank, p2p.world_size):
        raise UsageError(
            f"the parts of a hybrid backend are of one group: {_name(part)} (collectives on "
            f"{device}) is rank {part.rank} of {part.world_size}, {_name(p2p)} (p2p) is rank "
            f"{p2p.rank} of {p2p.world_size}"
        )
    if part.devices is not None and device not in part.devices:
        raise UsageError(
            f"{_name(part)} cannot carry out collectives on {device}: it takes arrays on {', '.join(part.devices)} here"
        )


def _name(part: Backend) -> str:
    return type(part).__name__
