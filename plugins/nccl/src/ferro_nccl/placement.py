"""The choice of a rank's GPU, and the check that the ranks' GPUs and NCCL versions can be connected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ferro.errors import BackendUnavailable
from ferro.runtime.environment import variable

SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
SHARING_SINCE = 23003  # NCCL 2.30.3


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlacement:
    """A rank's host, GPU and NCCL, which the ranks compare before they connect.

    Attributes:
        rank: the rank.
        host: where it runs, for messages.
        gpu: its GPU, as NCCL tells GPUs apart; see `gpu_name`.
        version: NCCL's version, such as 23203.
        sharing: True if NCCL was told to allow several ranks on one GPU.
    """

    rank: int
    host: str
    gpu: str
    version: int
    sharing: bool

    def encode(self) -> bytes:
        """Encode it as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, raw: bytes) -> RankPlacement:
        """Decode the result of `encode`."""
        return cls(**json.loads(raw))

    def describe(self) -> str:
        """Name rank and host, for messages."""
        return f"rank {self.rank} (host {self.host})"


def sharing_allowed() -> bool:
    """Return True if NCCL was told, in this process, to allow several ranks on one GPU."""
    return variable(SHARING) == "1"


def gpu_name(uuid: str) -> str:
    """Name a GPU as NCCL tells GPUs apart: by its UUID and the host id that the user set."""
    host = variable("NCCL_HOSTID")
    return f"{uuid}@{host}" if host else uuid


def choose_gpu(visible: int, local_rank: int, wanted: int | None) -> int:
    """Choose the number of this rank's GPU.

    Args:
        visible: how many GPUs this process sees.
        local_rank: number of this process on its host.
        wanted: the number that the user asked for, if any.

    Raises:
        BackendUnavailable: there is no GPU for this rank.
    """
    if visible < 1:
        raise _refusal("this process sees no GPU", "Check CUDA_VISIBLE_DEVICES and nvidia-smi.")
    if wanted is not None:
        if wanted >= visible:
            raise _refusal(
                f"device={wanted} was asked for, and this process sees {_gpus(visible)}",
                "Ask for another, or change CUDA_VISIBLE_DEVICES.",
            )
        return wanted
    if local_rank < visible:
        return local_rank
    if visible == 1:  # the launcher shows each process a GPU of its own, or means to share one
        return 0
    raise _refusal(
        f"this process is number {local_rank} on its host (from 0), and sees {_gpus(visible)}",
        'Start no more processes on a host than it has GPUs, or choose with backend_options={"device": …}.',
    )


def find_conflict(placements: Sequence[RankPlacement]) -> tuple[str, str] | None:
    """Return a reason why these ranks cannot connect, and a remedy; None when they can."""
    first = placements[0]
    for placement in placements:
        if placement.version != first.version:
            return (
                f"{first.describe()} has NCCL {version_text(first.version)}, "
                f"{placement.describe()} has NCCL {version_text(placement.version)}",
                "Install the same version on all hosts.",
            )
    if all(placement.sharing for placement in placements) and first.version >= SHARING_SINCE:
        return None
    users: dict[str, RankPlacement] = {}
    for placement in placements:
        other = users.setdefault(placement.gpu, placement)
        if other is not placement:
            return (
                f"{other.describe()} and {placement.describe()} are on one GPU ({placement.gpu}), "
                f"which NCCL {version_text(first.version)} refuses",
                "Give each rank a GPU of its own: start as many processes as there are GPUs, or "
                f"set CUDA_VISIBLE_DEVICES. For tests, NCCL 2.30.3 and later allow it where "
                f"{SHARING}=1 is set on all ranks.",
            )
    return None


def version_text(version: int) -> str:
    """Write NCCL's version in the usual way, such as 2.32.3."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _refusal(reason: str, hint: str) -> BackendUnavailable:
    return BackendUnavailable("nccl", reason, hint)
