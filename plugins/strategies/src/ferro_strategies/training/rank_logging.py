"""Logging of all ranks: the first rank's records, the other ranks' warnings, each with its rank."""

from __future__ import annotations

import logging
from typing import TextIO

from ferro import ProcessGroup

FORMAT = "%(asctime)s rank %(rank)d %(levelname)s %(name)s: %(message)s"


def rank_handler(
    group: ProcessGroup,
    *,
    level: int = logging.INFO,
    others_level: int = logging.WARNING,
    stream: TextIO | None = None,
    format: str = FORMAT,  # noqa: A002 - as logging.basicConfig calls it
) -> logging.Handler:
    """Make a handler for `logging` that writes what this rank has to say.

        logging.basicConfig(level=logging.INFO, handlers=[rank_handler(group)])

    Args:
        group: gives the rank, which `format` names as `%(rank)d`.
        level: the lowest level that rank 0 writes.
        others_level: the lowest level that the other ranks write.
        stream: standard error when None.
        format: the format of a record.
    """
    handler = logging.StreamHandler(stream)
    handler.setLevel(level if group.rank == 0 else others_level)
    handler.setFormatter(logging.Formatter(format))
    rank = group.rank

    def add_rank(record: logging.LogRecord) -> bool:
        record.rank = rank
        return True

    handler.addFilter(add_rank)
    return handler
