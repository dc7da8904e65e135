"""SegmentWriter: threads that digest and write segments while the caller prepares the next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ferro_checkpoint.layout.digest import digest_of
from ferro_checkpoint.saving.save_plan import SavePlan
from ferro_checkpoint.storage.storage import NewDirectory, WritableFile

_MOST_WAITING_BYTES = 16 << 20  # of segments that were put together and are not written yet


class SegmentWriter:
    """Writes this rank's segments. After a failure it writes nothing more, and `close` raises it.

    Args:
        plan: of the save.
        directory: what is written.
        threads: how many write at the same time.
        progress: called with the bytes of each segment that is written.

    Attributes:
        digests: of the segments that are written, by number.
    """

    def __init__(
        self, plan: SavePlan, directory: NewDirectory, threads: int, progress: Callable[[int], None] | None
    ) -> None:
        self.digests: dict[int, str] = {}
        self._plan, self._directory, self._progress = plan, directory, progress
        self._files: dict[int, WritableFile] = {}
        self._lock = threading.Lock()
        self._waiting = threading.Condition()
        self._waiting_bytes = 0
        self._failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(1 if plan.whole_files else threads, thread_name_prefix="ferro-checkpoint")

    def submit(self, number: int, views: Callable[[], list[memoryview]]) -> None:
        """Write a segment, of which `views` returns the bytes when it is called, on a thread of the pool."""
        self._pool.submit(self._write, number, views, 0)

    def submit_copy(self, number: int, views: list[memoryview], nbytes: int) -> None:
        """Write a segment that was put together in memory; waits while too many bytes wait to be written."""
        with self._waiting:
            self._waiting.wait_for(
                lambda: self._waiting_bytes + nbytes <= _MOST_WAITING_BYTES or not self._waiting_bytes
            )
            self._waiting_bytes += nbytes
        self._pool.submit(self._write, number, lambda: views, nbytes)

    def close(self) -> None:
        """Wait until everything is written, and on disk.

        Raises:
            OSError and others: the first failure.
        """
        self._pool.shutdown(wait=True)
        for file in self._files.values():
            try:
                if self._failure is None:
                    file.sync()
            except Exception as error:  # noqa: BLE001 - raised when all files are closed
                self._failure = error
            finally:
                file.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Write nothing more, and close the files; what was written is of no use."""
        self._failure = self._failure or InterruptedError("the save was ended")
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()

    def _write(self, number: int, views: Callable[[], list[memoryview]], waiting: int) -> None:
        try:
            if self._failure is None:
                parts = views()
                segments, layout = self._plan.segments, self._plan.layout
                begin, end = segments.begin[number], segments.end[number]
                file = layout.file_at(begin)
                digest = digest_of(parts)
                self._file(file).write(parts, begin - layout.bases[file])
                self.digests[number] = digest
                if self._progress is not None:
                    self._progress(end - begin)
        except BaseException as error:  # noqa: BLE001 - raised by close
            self._failure = self._failure or error
        finally:
            if waiting:
                with self._waiting:
                    self._waiting_bytes -= waiting
                    self._waiting.notify_all()

    def _file(self, number: int) -> WritableFile:
        with self._lock:
            if number not in self._files:
                file = self._plan.layout.files[number]
                self._files[number] = self._directory.open(file.name, file.nbytes)
            return self._files[number]
