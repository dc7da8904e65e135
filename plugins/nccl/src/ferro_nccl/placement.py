"""Which GPU a rank takes, and whether the ranks' GPUs and libraries go together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ferro.errors import BackendUnavailable
from ferro.runtime.environment import variable

SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
SHARING_SINCE = 23003  # NCCL 2.30.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a rank tells the others of itself before they connect.

    Attributes:
        rank: the rank.
        host: where it runs, for messages.
        gpu: its GPU, as NCCL tells GPUs apart; see `gpu_name`.
        version: NCCL's version, such as 23203.
        sharing: NCCL was told to allow several ranks on one GPU.
    """

    rank: int
    host: str
    gpu: str
    version: int
    sharing: bool

    def encode(self) -> bytes:
        """Return it as bytes."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, raw: bytes) -> Card:
        """Return what `encode` made bytes of."""
        return cls(**json.loads(raw))

    def who(self) -> str:
        """Return rank and host, for messages."""
        return f"rank {self.rank} (host {self.host})"


def sharing_allowed() -> bool:
    """Say whether NCCL was told, in this process, to allow several ranks on one GPU."""
    return variable(SHARING) == "1"


def gpu_name(uuid: str) -> str:
    """Return what names a GPU: its UUID, and the host where the user set another for NCCL."""
    host = variable("NCCL_HOSTID")
    return f"{uuid}@{host}" if host else uuid


def choose_gpu(visible: int, local_rank: int, wanted: int | None) -> int:
    """Return the number of the GPU that this rank takes.

    Args:
        visible: how many this process sees.
        local_rank: number of this process on its host.
        wanted: what the user asked for, None for nothing.

    Raises:
        BackendUnavailable: there is none for it.
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
        "Start no more processes on a host than it has GPUs, or choose with "
        'backend_options={"device": …}.',
    )


def objection(cards: Sequence[Card]) -> tuple[str, str] | None:
    """Return why these ranks cannot connect, and what to do; None when they can."""
    first = cards[0]
    for card in cards:
        if card.version != first.version:
            return (
                f"{first.who()} has NCCL {release(first.version)}, "
                f"{card.who()} has NCCL {release(card.version)}",
                "Install the same version on all hosts.",
            )
    if all(card.sharing for card in cards) and first.version >= SHARING_SINCE:
        return None
    users: dict[str, Card] = {}
    for card in cards:
        other = users.setdefault(card.gpu, card)
        if other is not card:
            return (
                f"{other.who()} and {card.who()} are on one GPU ({card.gpu}), which NCCL "
                f"{release(first.version)} refuses",
                "Give each rank a GPU of its own: start as many processes as there are GPUs, or "
                f"set CUDA_VISIBLE_DEVICES. For tests, NCCL 2.30.3 and later allow it where "
                f"{SHARING}=1 is set on all ranks.",
            )
    return None


def release(version: int) -> str:
    """Return NCCL's version as people write it."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _refusal(reason: str, hint: str) -> BackendUnavailable:
    return BackendUnavailable("nccl", reason, hint)
