"""Addresses: every byte of a checkpoint's files by one number, as if the files lay one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.layout.bundle import TensorFile, layout_bundle
from ferro_checkpoint.layout.limits import check_bundle
from ferro_checkpoint.placement.local_array import COMPLEX128
from ferro_checkpoint.plan.agreement import Holdings

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The files of a checkpoint that is to be written.

    Attributes:
        files: all of them.
        bundles: names of the files of each bundle.
        bases: the address of each file's first byte, and at the end that of the byte after the last file.
        addresses: of the first byte of each array, by its number in the holdings.
    """

    files: Sequence[TensorFile]
    bundles: dict[str, tuple[str, ...]]
    bases: list[int]
    addresses: Indices

    def file_at(self, address: int) -> int:
        """Return the number of the file that has the byte at this address."""
        return bisect_right(self.bases, address) - 1


def layout_files(holdings: Holdings, file_bytes: int) -> FileLayout:
    """Choose the files of all bundles; every rank chooses the same.

    Args:
        holdings: the arrays.
        file_bytes: how many bytes of data a file may have, unless it has one tensor alone.

    Raises:
        StateError: no reader would take the headers or the index.
    """
    bundles: dict[str, dict[str, int]] = {}
    for number, name in enumerate(holdings.names):
        bundle, _, tensor = name.partition(".")
        bundles.setdefault(bundle, {})[tensor] = number
    files: list[TensorFile] = []
    names: dict[str, tuple[str, ...]] = {}
    bases, address = [], 0
    addresses = np.zeros(len(holdings.names), np.int64)
    for bundle in sorted(bundles):
        numbers = bundles[bundle]
        described = {
            tensor: (_stored(holdings.dtypes[number]), holdings.shapes[number]) for tensor, number in numbers.items()
        }
        own = layout_bundle(bundle, described, file_bytes)
        check_bundle(bundle, own)
        names[bundle] = tuple(file.name for file in own)
        for file in own:
            files.append(file)
            bases.append(address)
            for tensor, stored in file.tensors.items():
                addresses[numbers[tensor]] = address + stored.begin
            address += file.nbytes
    return FileLayout(files, names, [*bases, address], addresses)


def _stored(dtype: str) -> str:
    return "F64" if dtype == COMPLEX128 else dtype
