"""Progress of a loop, shown by one rank: a bar on a terminal, now and then a whole line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Generic, TextIO, TypeVar

from ferro import ProcessGroup

from ..nn.checks import check_group

T = TypeVar("T")


class Progress(Generic[T]):
    """Iterate over something, and show how far it has come on rank 0.

    On a terminal it is the bar of tqdm, where that is installed (`pip install ferro-strategies[progress]`). Elsewhere,
    as under `ferro run` and in files, a bar that is drawn again and again would fill them; there it writes a line every
    `interval_s` seconds, and one at the end.

        for x, labels in (steps := Progress(loader, group, description="epoch 3")):
            …
            steps.show(loss=loss)

    Args:
        iterable: what to iterate over.
        group: rank 0 of it shows the progress; the others iterate only.
        total: the number of items; `len(iterable)` when None and known.
        description: text before the numbers.
        interval_s: seconds between two lines.
        stream: standard error when None.
    """

    def __init__(
        self,
        iterable: Iterable[T],
        group: ProcessGroup,
        *,
        total: int | None = None,
        description: str = "",
        interval_s: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        self._iterable = iterable
        check_group("Progress", group)
        self._shows = group.rank == 0
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self._total, self._description, self._interval_s = total, description, interval_s
        self._stream = sys.stderr if stream is None else stream
        self._values: dict[str, object] = {}

    def show(self, **values: object) -> None:
        """Show these values from now on, floats with four digits."""
        self._values |= values

    def __len__(self) -> int:
        return 0 if self._total is None else self._total

    def __iter__(self) -> Iterator[T]:
        if not self._shows:
            return iter(self._iterable)
        bar = self._bar() if self._stream.isatty() else None
        return self._with_lines() if bar is None else bar

    def _bar(self) -> Iterator[T] | None:
        try:
            from tqdm import tqdm  # type: ignore[import-untyped] # here, since it is an extra
        except ImportError:
            return None
        return self._with_bar(tqdm(self._iterable, self._description, self._total, file=self._stream))

    def _with_bar(self, bar: Iterable[T]) -> Iterator[T]:
        for item in bar:
            yield item
            bar.set_postfix_str(self._shown(), refresh=False)  # type: ignore[attr-defined]

    def _with_lines(self) -> Iterator[T]:
        began = last = time.monotonic()
        count = 0
        for item in self._iterable:
            yield item
            count += 1
            if (now := time.monotonic()) - last >= self._interval_s and count != self._total:
                last = now
                self._write(count, now - began)
        self._write(count, time.monotonic() - began)

    def _write(self, count: int, seconds: float) -> None:
        parts = [f"{count}/{self._total}" if self._total is not None else str(count), f"{seconds:.0f} s"]
        if seconds and count:
            parts.append(f"{count / seconds:.3g}/s")
            if self._total is not None and count < self._total:
                parts.append(f"{(self._total - count) * seconds / count:.0f} s left")
        line = f"{self._description}: " * bool(self._description) + ", ".join(parts)
        self._stream.write(f"{line} {self._shown()}".rstrip() + "\n")  # one write, so that no other line cuts it
        self._stream.flush()

    def _shown(self) -> str:
        return " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self._values.items()
        )
