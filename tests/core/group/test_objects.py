"""Python values on several ranks: pieces, announced sizes, codecs."""

import secrets

import numpy as np
import pytest

from ferro import UsageError, simulate
from ferro.group import objects


def test_large_values_travel_in_pieces(monkeypatch):
    monkeypatch.setattr(objects, "PIECE_BYTES", 100)
    values = [secrets.token_bytes(size) for size in (0, 1000, 250)]

    def work(group):
        mine = values[group.rank]
        assert group.all_gather_object(mine) == values
        assert group.gather_object(mine, 1) == (values if group.rank == 1 else None)
        assert group.broadcast_object(mine, 1) == values[1]
        assert group.scatter_object(values if group.rank == 2 else None, 2) == mine
        if group.rank == 0:
            group.send_object(values[1], 1)
        elif group.rank == 1:
            assert group.recv_object(0) == values[1]

    simulate(work, 3)


@pytest.mark.parametrize("announced", [objects.MAX_BYTES + 1, 1 << 50, -5])
@pytest.mark.parametrize(
    "call",
    [lambda group: group.all_gather_object({"a": 1}), lambda group: group.gather_object({"a": 1}, 0)],
    ids=["all_gather_object", "gather_object"],
)
def test_an_announced_size_is_refused_before_memory_is_taken(announced, call):
    def work(group):
        if group.rank == 1:
            group.all_gather(np.array(announced))
            return
        with pytest.raises(UsageError, match=f"announces a value of {announced} bytes, which is refused"):
            call(group)

    simulate(work, 2)


def test_values_in_another_codec_are_refused():
    def work(group):
        codec = "pickle" if group.rank == 0 else "msgpack"
        with pytest.raises(UsageError, match="encoded with codec="):
            group.all_gather_object({"a": 1}, codec=codec)
        if group.rank == 0:
            group.broadcast_object({"a": 1}, codec="pickle")
            return
        with pytest.raises(UsageError, match="encoded with codec='pickle', and this rank expects 'msgpack'"):
            group.broadcast_object()

    simulate(work, 2)


def test_a_random_generator_takes_another_ones_state():
    def work(group):
        generator = np.random.default_rng(group.rank)
        generator.random(5)
        generator.bit_generator.state = group.broadcast_object(generator.bit_generator.state)
        return generator.random(3).tolist()

    first, second = simulate(work, 2)
    assert first == second


def test_a_masked_array_in_an_object_is_refused():
    def work(group):
        with pytest.raises(UsageError, match=r"value\['m'\] is a MaskedArray, whose mask would be lost: pass x.filled"):
            group.all_gather_object({"m": np.ma.array([1.0], mask=[True])})

    simulate(work, 1)
