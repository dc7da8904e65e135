"""The head of a scatter: what the root writes is what every rank reads."""

import numpy as np
import pytest

from ferro.group.uneven import Layout, blank_header, read_header, write_header
from ferro.simulated import simulate
from ferro_testing.samples import dtype_of

RANKS = 3


@pytest.mark.parametrize("row_shape", [(), (5,), (2, 0, 7), (1,) * 63], ids=len)
@pytest.mark.parametrize("name", ["bool", "bfloat16", "c16"])
def test_what_is_written_is_read(name, row_shape):
    dtype, layout = dtype_of(name), Layout.of([4, 0, 1 << 40], row_shape)
    head = blank_header(RANKS)
    write_header(head, dtype, layout)
    assert read_header(head, RANKS) == (dtype, layout)
    assert head.shape == blank_header(RANKS).shape


@pytest.mark.parametrize("sizes", [None, [1, 0, 5]])
@pytest.mark.parametrize("root", range(RANKS))
def test_the_other_ranks_learn_all_from_the_root(root, sizes):
    whole = np.arange(12, dtype=np.int16).reshape(6, 2)

    def work(group):
        block = group.scatter(whole if group.rank == root else None, root, sizes=sizes)
        return block.dtype, block.tolist()

    rows = sizes or [2, 2, 2]
    expected = [(whole.dtype, block.tolist()) for block in np.split(whole, np.cumsum(rows)[:-1])]
    assert simulate(work, RANKS, timeout_s=5, run_timeout_s=20) == expected
