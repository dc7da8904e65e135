"""ReplicaCheck: notice within a step that replicas of a model are no longer equal, and name the parameters.

Each rank computes a checksum of its parameters in every step and adds it to a message that is sent anyway. A checksum
that only some ranks have shows itself in the reduced message, in the same way on all ranks; only then they exchange
the checksums of the single parameters, for the error.

A checksum takes a small part of the time of a step: it covers about `_BUDGET_BYTES`. Of an array that is larger than
its share it covers another window each time, and a sample of the rest. An optimizer that went another way has changed
nearly every element, so it is found at once.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ferro import ProcessGroup, UsageError, Work

from .nn.arrays import Array, namespace_of
from .nn.checks import first_few

_DIGEST_BITS = 32
_DIGEST_MASK = (1 << _DIGEST_BITS) - 1
_SMALL_BYTES = 1 << 10
_BUDGET_BYTES = 1 << 20
_LEAST_WINDOW_BYTES = 1 << 13
_SAMPLES = 16
# Integers below this number, and their sums, are exact in float32; a mean of them can be multiplied back.
_EXACT_BITS = 22


def checksum(array: Array) -> int:
    """Compute a checksum of all bytes of an array, of its dtype and shape."""
    host = array if isinstance(array, np.ndarray) else namespace_of(array).asnumpy(array)
    kind = zlib.crc32(f"{host.dtype.name} {host.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data, kind)


class ReplicaCheck:
    """The checksums of the replicas on the ranks of a group.

    Args:
        group: the ranks that have replicas.

    Attributes:
        tail_size: the number of elements of a reduced message that carry a checksum.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._turn = 0
        self._words: list[tuple[Array, Array]] = []
        self._window_bytes = _BUDGET_BYTES
        self._written: list[int] = []
        self._bits = max(1, (_EXACT_BITS - math.ceil(math.log2(max(group.world_size, 2)))) // 2)
        self._shifts = range(0, _DIGEST_BITS, self._bits)
        self.tail_size = 2 * len(self._shifts)

    def digest(self, arrays: Sequence[Array]) -> int:
        """Compute the checksum of this step, a number of 32 bits, from all NumPy arrays among these."""
        if len(self._words) != len(arrays):
            self._words = [(array, _as_words(array)) for array in arrays]
            large = sum(array.nbytes > _SMALL_BYTES for array in arrays)
            self._window_bytes = max(_LEAST_WINDOW_BYTES, _BUDGET_BYTES // max(large, 1))
        turn, sums, crc = self._turn, [], 0
        self._turn += 1
        for index, array in enumerate(arrays):
            known, words = self._words[index]
            if known is not array:
                words = _as_words(array)
                self._words[index] = array, words
            if words.itemsize == 1:
                crc = zlib.crc32(words.data, crc)
            elif words.nbytes <= self._window_bytes:
                sums.append(int(np.add.reduce(words, dtype=words.dtype)))
            else:
                window = self._window_bytes // words.itemsize
                start = turn % -(-words.size // window) * window
                sums.append(int(np.add.reduce(words[start : start + window], dtype=words.dtype)))
                stride = words.size // _SAMPLES
                sums.append(int(np.add.reduce(words[turn % stride :: stride], dtype=words.dtype)))
        return hash((crc, *sums)) & _DIGEST_MASK  # of integers it is the same in all processes

    def skip(self) -> None:
        """Let a step go by in which this rank's values do not count."""
        self._turn += 1

    # -- in the tail of a message that is averaged -------------------------------------------------

    def write(self, digest: int | None, tail: Array) -> None:
        """Put a checksum into a message of which the mean is taken; None from a rank whose values do not count.

        Each piece of the checksum is followed by its square. Pieces are equal on all ranks if, and only if, the mean of
        the squares is the square of the mean.
        """
        values = []
        for shift in self._shifts:
            piece = 0 if digest is None else digest >> shift & ((1 << self._bits) - 1)
            values += [piece, piece * piece]
        tail[...] = values if isinstance(tail, np.ndarray) else namespace_of(tail).asarray(values, tail.dtype)
        self._written = values

    def agree(self, tail: Array, counting: int) -> bool:
        """Say whether the checksums of `counting` ranks were equal, from the mean over all ranks."""
        host = tail if isinstance(tail, np.ndarray) else namespace_of(tail).asnumpy(tail)
        means = host.real.tolist()
        if counting == self._group.world_size and means == self._written:
            return True  # the mean of the squares is the square of the mean
        sums = [round(mean * self._group.world_size) for mean in means]
        return all(squares * counting == total * total for total, squares in zip(sums[::2], sums[1::2], strict=True))

    # -- in a message of which the greatest bytes are taken ------------------------------------------

    @staticmethod
    def to_bytes(digest: int | None) -> Array:
        """Make eight bytes for a reduction by "max": the checksum and its complement; None from ranks without one."""
        if digest is None:
            return np.zeros(2 * _DIGEST_BITS // 8, np.uint8)
        return np.array([digest, ~digest & _DIGEST_MASK], np.uint32).view(np.uint8)

    @staticmethod
    def agree_bytes(reduced: Array) -> bool:
        """Say whether the checksums were equal, from the greatest of all ranks' bytes."""
        half = reduced.size // 2
        return bool((reduced[:half] == ~reduced[half:]).all())


class ReplicaAgreement:
    """Finds out whether replicas are equal by messages of its own, in the background; the constructor starts it.

    own checksum --sum over shards--> checksum of the replica --greatest over replicas--> compared

    All ranks see the same result, also where each replica is sharded over a group.

    Args:
        digest: the checksum of this rank's values.
        shards: the ranks over which this replica is sharded, if any.
        replicas: the ranks that hold the same values as this one.
    """

    def __init__(self, digest: int, shards: ProcessGroup | None, replicas: ProcessGroup) -> None:
        self._replicas = replicas
        self._digest = np.array(digest, np.uint32)
        self._summed = shards is None
        self._message = np.empty(0, np.uint8)
        if shards is None:
            self._compare()
        else:
            self._work: Work[object] = shards.all_reduce(self._digest, out=self._digest, async_op=True)

    def advance(self) -> bool:
        """Wait for the step under way and start the next one; return True if there is none."""
        self._work.wait()
        if self._summed:
            return True
        self._summed = True
        self._compare()
        return False

    @property
    def equal(self) -> bool:
        """True if the replicas are equal, once `advance` has returned True."""
        return ReplicaCheck.agree_bytes(self._message)

    def _compare(self) -> None:
        self._message = ReplicaCheck.to_bytes(int(self._digest))
        self._work = self._replicas.all_reduce(self._message, "max", out=self._message, async_op=True)


def replicas_error(
    strategy: str,
    group: ProcessGroup,
    named: Iterable[tuple[str, Array]],
    *,
    counts: bool = True,
    shards: ProcessGroup | None = None,
) -> UsageError:
    """Compare the replicas array by array; make the error that names the arrays and ranks that differ.

    All ranks of the group call it.

    Args:
        strategy: name for the message.
        group: the ranks that have replicas.
        named: the arrays of the replica, with the same names on all ranks.
        counts: False on a rank whose replica may differ.
        shards: the ranks over which each replica is sharded, if any; all of them call it, too.
    """
    own = {name: checksum(array) for name, array in named}
    by_rank: list[tuple[bool, dict[str, int]]] = group.all_gather_object((counts, own))
    differences = describe_differences({rank: sums for rank, (counting, sums) in enumerate(by_rank) if counting})
    if shards is not None:
        lists: list[list[str]] = shards.all_gather_object(differences)
        differences = list(dict.fromkeys(difference for each in lists for difference in each))
    found = "; ".join(first_few(differences)) or "the ranks no longer find the difference"
    return UsageError(
        f"{strategy} on group {group.name!r}: the replicas are no longer equal: {found}. Something has changed the "
        "parameters on some ranks only: a step with other gradients or another learning rate, a state loaded on one "
        "rank, values assigned. Nothing was stepped since. Load one state on all ranks, or restart from a checkpoint; "
        "check_replicas=False turns this check off.",
        group=group.name,
        rank=group.rank,
    )


def describe_differences(by_rank: Mapping[int, Mapping[str, int]]) -> list[str]:
    """List the names whose checksums differ between ranks, each with the ranks that are not like most others."""
    found = []
    names = dict.fromkeys(name for sums in by_rank.values() for name in sums)
    for name in names:
        sums = {rank: of_rank.get(name) for rank, of_rank in by_rank.items()}
        usual, times = Counter(sums.values()).most_common(1)[0]
        if times == len(sums):
            continue
        groups: dict[int | None, list[int]] = {}
        for rank, value in sums.items():
            if value != usual:
                groups.setdefault(value, []).append(rank)
        ranks = sorted(rank for members in groups.values() for rank in members)
        like = next(rank for rank, value in sums.items() if value == usual)
        words = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
        found.append(f"{name!r} ({words} from rank {like})")
    return found


def _as_words(array: Array) -> Array:
    """View a NumPy array as integers: as bytes where it is small, and otherwise as the widest words that fit.

    An array of another kind, which would have to be copied, gives no words.
    """
    if not isinstance(array, np.ndarray):
        return np.empty(0, np.uint8)
    flat = array.reshape(array.size).view(np.uint8)
    address = flat.__array_interface__["data"][0] | flat.size
    if flat.size > _SMALL_BYTES:
        for dtype in (np.uint64, np.uint32, np.uint16):
            if address % np.dtype(dtype).itemsize == 0:
                return flat.view(dtype)
    return flat
