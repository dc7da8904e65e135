"""The errors of checkpoints, sorted by what the reader can do about them."""

from __future__ import annotations

from ferro import FerroError, UsageError
from ferro.errors import PeerLost


class StateError(UsageError):
    """The state does not fit what it is to be saved with or loaded from: nothing was written or changed."""


class CheckpointError(FerroError):
    """A checkpoint could not be written or read.

    Attributes:
        path: the file or directory concerned.
        tensor: the tensor concerned, or None.
    """

    def __init__(self, message: str, *, path: str, tensor: str | None = None, rank: int | None = None) -> None:
        super().__init__(message, op="checkpoint", rank=rank)
        self.path = path
        self.tensor = tensor


class CheckpointDamaged(CheckpointError):
    """A file is not what was written: load an older checkpoint."""


class CheckpointIncomplete(CheckpointError):
    """There is no commit record: the save did not end, or this is no checkpoint. Load an older one."""


class CheckpointTooNew(CheckpointError):
    """A newer version of ferro-checkpoint has written it: update."""


class SaveFailed(CheckpointError):
    """A checkpoint was not written, on any rank; the earlier ones are as they were."""


class SaveLostPeer(SaveFailed, PeerLost):
    """A checkpoint was not written, since a rank is gone: `except PeerLost` catches this as well.

    `peer` is its rank in the group that saved.
    """

    def __init__(self, message: str, *, path: str, lost: PeerLost, rank: int | None = None) -> None:
        super().__init__(message, path=path, rank=rank)
        self.peer, self.host, self.group = lost.peer, lost.host, lost.group


def save_failed(message: str, error: FerroError, *, path: str, rank: int | None) -> SaveFailed:
    """Return the error of a save that another error has ended, which becomes its cause."""
    if isinstance(error, PeerLost):
        return SaveLostPeer(message, path=path, lost=error, rank=rank)
    return SaveFailed(message, path=path, rank=rank)
