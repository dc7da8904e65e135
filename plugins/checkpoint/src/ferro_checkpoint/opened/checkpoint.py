"""OpenedCheckpoint: the record of a committed checkpoint, where its tensors are, and its bytes, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.layout.bundle import index_name
from ferro_checkpoint.layout.digest import Digester, digester
from ferro_checkpoint.layout.header import LENGTH_BYTES, MOST_HEADER_BYTES, StoredTensor, decode_header, header_length
from ferro_checkpoint.layout.json_text import shown
from ferro_checkpoint.layout.record import RECORD_NAME, Record
from ferro_checkpoint.opened.damage import HeaderNames, damage_text
from ferro_checkpoint.opened.files import CheckpointFiles
from ferro_checkpoint.opened.index import check_index
from ferro_checkpoint.opened.place import COMPLEX128, StoredPlace
from ferro_checkpoint.opened.record import again_if_replaced, open_files
from ferro_checkpoint.storage.storage import Bytes, Storage


class OpenedCheckpoint:
    """A checkpoint that is open for reading. Several threads may read at the same time.

    Attributes:
        path: of its directory, for messages.
        record: what was committed.
        tensors: where each tensor is, by full name ("model.0.weight").
        verifies: whether digests are checked.
    """

    def __init__(self, record: Record, files: CheckpointFiles, digest: Digester | None) -> None:
        self.path = files.path
        self.record = record
        self.tensors: Mapping[str, StoredPlace] = {}
        self._files = files
        self._digest = digest
        self.verifies = digest is not None
        self._ends = {file: np.array(it.ends, np.int64) for file, it in record.files.items()}
        self._latest: tuple[str, int, Bytes] | None = None  # the segment of which a part was read last, and its bytes

    @classmethod
    def open(cls, storage: Storage, name: str, *, verify: bool = True) -> OpenedCheckpoint:
        """Read the record, and each file's header, and check that they fit each other and the files' lengths.

        If a save replaces the checkpoint meanwhile, this begins again: what is open is all of one save, and stays so.

        Args:
            storage: where the checkpoint is.
            name: of its directory.
            verify: whether the digests of all that is read, here and later, are checked.

        Raises:
            CheckpointIncomplete: there is no record; the message says what is there.
            CheckpointDamaged: a file is gone, has another length, or is not what was written.
            CheckpointTooNew: a newer version of this package has written it.
            CheckpointReplaced: saves replace it faster than it can be opened.
        """
        return again_if_replaced(lambda: cls._open(storage, name, verify=verify))

    @classmethod
    def _open(cls, storage: Storage, name: str, *, verify: bool) -> OpenedCheckpoint:
        record, files = open_files(storage, name)
        try:
            return cls.of_files(record, files, verify=verify)
        except BaseException:
            files.close()
            raise

    @classmethod
    def of_files(cls, record: Record, files: CheckpointFiles, *, verify: bool = True) -> OpenedCheckpoint:
        """Open a checkpoint whose record has been read; see `open`. It takes over the files.

        Raises:
            CheckpointReplaced: another one has got its name meanwhile.
            CheckpointDamaged, CheckpointTooNew: see `open`.
        """
        self = cls(record, files, digester(record.digest, files.path) if verify else None)
        try:
            self.tensors = self._read_headers()
        except CheckpointError as error:
            files.check_current(error)
            raise
        files.check_same()
        return self

    def __enter__(self) -> OpenedCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._latest = None
        self._files.close()

    def check_unchanged(self) -> None:
        """Check that no file has been written to since it was opened; call it after reads that no digest checks.

        Raises:
            CheckpointDamaged: a file has been.
            CheckpointReplaced: what was read may be of another checkpoint, which has got the name meanwhile.
        """
        self._files.check_unchanged()

    def segments(self, file: str) -> NDArray[np.int64]:
        """Return one more than the last byte of each segment of a file; they grow."""
        return self._ends[file]

    def read_segment(self, file: str, k: int, destinations: Sequence[Bytes]) -> None:
        """Fill these, one after the other, with segment `k` of a file, all of it, and check its digest.

        A segment with another digest is not read again: the system would give the same bytes from its memory, and a
        disk that gives two answers is not to be trusted either.

        Raises:
            CheckpointDamaged: the bytes are not those that were written; the message names file and tensors. What
                is in the destinations is of no use then.
        """
        begin, end = self._range(file, k)
        assert sum(it.nbytes for it in destinations) == end - begin, "the destinations do not fit the segment"
        with self._files.opened(file) as handle:
            handle.read_into(destinations, begin)
        if self._digest is not None and self._digest(destinations) != self.record.files[file].digests[k]:
            raise self._damage(file, begin, end)

    def read_bytes(self, file: str, begin: int, destination: Bytes) -> None:
        """Fill this with a file's bytes from `begin` on; check the digests of the segments that they lie in.

        Reading small ranges one after the other reads each segment once: the last one is kept.
        """
        if not destination.nbytes:
            return
        ends, end = self._ends[file], begin + destination.nbytes
        for k in range(int(ends.searchsorted(begin, "right")), int(ends.searchsorted(end, "left")) + 1):
            first, last = self._range(file, k)
            start, stop = max(first, begin), min(last, end)
            if start >= stop:
                continue
            part = destination[start - begin : stop - begin]
            if (start, stop) == (first, last):
                self.read_segment(file, k, [part])
            else:
                part[:] = self._segment(file, k)[start - first : stop - first]

    def read_tensor(self, name: str) -> NDArray[np.generic]:
        """Read a tensor by its full name; the digests of all segments that it lies in are checked.

        Raises:
            KeyError: there is none.
            CheckpointDamaged: its bytes are not those that were written.
            CheckpointError: its dtype needs ml_dtypes, which is not installed.
        """
        place = self.tensors[name]
        array = np.empty(place.array_shape, place.array_dtype(name, self.path))
        self.read_bytes(place.file, place.begin, array.reshape(-1).view(np.uint8).data)
        return array

    def tensors_within(self, file: str, begin: int, end: int) -> list[str]:
        """List the full names of the tensors that have bytes in this range of a file, in the file's order."""
        found = [
            (place.begin, name)
            for name, place in self.tensors.items()
            if place.file == file and place.begin < end and place.end > begin
        ]
        return [name for _, name in sorted(found)]

    def _range(self, file: str, k: int) -> tuple[int, int]:
        ends = self._ends[file]
        return int(ends[k - 1]) if k else 0, int(ends[k])

    def _segment(self, file: str, k: int) -> Bytes:
        latest = self._latest
        if latest is not None and latest[:2] == (file, k):
            return latest[2]
        begin, end = self._range(file, k)
        self._latest = latest = None  # so that no two are in memory
        content = np.empty(end - begin, np.uint8).data
        self.read_segment(file, k, [content])
        self._latest = (file, k, content)
        return content

    def _read_headers(self) -> dict[str, StoredPlace]:
        """Read the headers of all bundles' files, and compare them with the indexes and the record."""
        listed = self.record.values.get(COMPLEX128, [])
        if not isinstance(listed, list) or set(map(type, listed)) - {str}:
            raise self._contradiction(RECORD_NAME, f"its {COMPLEX128!r} is no list of names")
        found: dict[str, StoredPlace] = {}
        for bundle, files in self.record.bundles.items():
            where: dict[str, str] = {}
            for file in files:
                tensors = self._read_header(file)
                for tensor in where.keys() & tensors.keys():
                    raise self._contradiction(file, f"tensor {shown(tensor)} is also in {where[tensor]}", tensor)
                where |= dict.fromkeys(tensors, file)
                found |= {
                    f"{bundle}.{tensor}": StoredPlace(file, dtype, shape, begin, end, False)
                    for tensor, (dtype, shape, begin, end) in tensors.items()
                }
            index = index_name(bundle)
            if len(files) > 1 and index not in self.record.files:
                raise self._contradiction(index, "the record does not list the index of a bundle of several files")
            if index in self.record.files:
                check_index(self._read_small(index), where, self._path(index))
        for name in listed:
            place = found.get(name)
            if place is None or place.dtype != "F64" or place.shape[-1:] != (2,):
                text = f"tensor {shown(name)} is said to be complex128, and is not"
                raise self._contradiction(RECORD_NAME, text, name)
            found[name] = place._replace(complex128=True)
        return found

    def _read_header(self, file: str) -> dict[str, StoredTensor]:
        nbytes = self.record.files[file].nbytes
        first = np.zeros(min(LENGTH_BYTES, nbytes), np.uint8)
        self.read_bytes(file, 0, first.data)
        header = np.empty(header_length(first.tobytes(), nbytes, self._path(file)), np.uint8)
        self.read_bytes(file, 0, header.data)
        return decode_header(header.tobytes(), nbytes, self._path(file))[0]

    def _read_small(self, file: str) -> bytes:
        nbytes = self.record.files[file].nbytes
        if nbytes > MOST_HEADER_BYTES:
            raise self._contradiction(file, f"an index of {nbytes} bytes is too large")
        content = np.empty(nbytes, np.uint8)
        self.read_bytes(file, 0, content.data)
        return content.tobytes()

    def _damage(self, file: str, begin: int, end: int) -> CheckpointDamaged:
        self._files.check_unchanged()
        path = self._path(file)
        # While headers are read, no tensor is known yet; a header may share its segment with data.
        names = self.tensors_within(file, begin, end) or HeaderNames(self._files, self.record).within(file, begin, end)
        return CheckpointDamaged(damage_text(path, begin, end, names), path=path, tensor=next(iter(names), None))

    def _contradiction(self, file: str, text: str, tensor: str | None = None) -> CheckpointDamaged:
        path = self._path(file)
        return CheckpointDamaged(f"{path}: {text}: load an older checkpoint", path=path, tensor=tensor)

    def _path(self, file: str) -> str:
        return self._files.path_of(file)
