"""A state that cannot be saved or loaded is one clear error on every rank, before anything is written or changed."""

from __future__ import annotations

import os

import numpy as np
import pytest

import ferro
import ferro_checkpoint
from ferro_checkpoint import ArrayPiece, StateError
from ferro_checkpoint.state import value_agreement

from ..placements import Holder


def errors_of(world_size, function):
    """Run a function on simulated ranks; return the error of each."""

    def run(group):
        try:
            function(group)
        except ferro.FerroError as error:
            return error
        return None

    return ferro.simulate(run, world_size, timeout_s=10, run_timeout_s=30)


def refused_save(directory, state_of, world_size=3):
    """Save states that cannot be saved; return the message, which is the same on all ranks but for who found it."""
    path = str(directory / "c")
    errors = errors_of(world_size, lambda group: ferro_checkpoint.save(path, state_of(group.rank), group))
    assert [type(error) for error in errors] == [StateError] * world_size
    assert os.listdir(directory) == []
    texts = [str(error) for error in errors]
    shortest = min(texts, key=len)
    assert all(text.endswith(shortest) for text in texts)
    return max(texts, key=len)


def row(rank, extent, **more):
    """A row of a matrix with four columns and `extent` rows."""
    return Holder({"x": ArrayPiece((extent, 4), np.full((1, 4), float(rank)), (rank, 0), (1, 4), **more)})


def itself():
    state = {"x": np.zeros(2)}
    state["again"], state["and"] = state, [state, state]
    return state


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def message_of(value):
    return value if isinstance(value, str) else ""


ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("state_of", "message"),
    [
        (
            lambda rank: {"a": {"x": ONES} | ({"y": ONES} if rank == 1 else {})},
            "'a.y' is on rank 1, and not on ranks 0, 2",
        ),
        (
            lambda rank: {"a": {"x": np.ones(3 + (rank == 2))}},
            r"'a.x': it is F64 \(3,\) on rank 0, and F64 \(4,\) on rank 2",
        ),
        (
            lambda rank: {"a": {"x": ONES.astype("f8" if rank else "f4")}},
            "it is F32 .* on rank 0, and F64 .* on rank 1",
        ),
        (lambda rank: {"a": {"x": np.array([0.0, rank == 2])}}, "'a.x' is on ranks 0 and 2, and its values differ"),
        (lambda rank: {"a": {"x": np.array([np.nan, rank])}}, "'a.x' is on ranks 0 and 1, and its values differ"),
        (lambda rank: {"a": row(rank, 4)}, "no rank holds its elements 12 to 15 of 16"),
        (lambda rank: {"a": row(rank, 2)}, r"found by rank 2 of 3: 'a.x': a piece of 4 elements at \(2, 0\)"),
        (lambda rank: {"a": row(min(rank, 1) * (rank + 1) // 2, 3)}, "no rank holds|overlap"),
        (
            lambda rank: {
                "a": Holder({"x": ArrayPiece((4,), np.arange(2.0 + rank) * min(rank, 1), (0,), (4,), (0, 2 + rank))})
            },
            "'a.x' is on ranks 0 and 1, and its values differ",
        ),
        (
            lambda rank: {"a": Holder({"x": ArrayPiece((4, 4), np.ones((4, 2)), (0, rank), (4, 2))})},
            r"pieces of different ranks overlap and are not the same: \[0:4, 0:2\] and \[0:4, 1:3\]",
        ),
        (
            lambda rank: {
                "a": Holder({"x": ArrayPiece((2, 4), np.full((2, 2), rank == 2), (0, 2 * (rank > 0)), (2, 2))})
            },
            "'a.x' is on ranks 1 and 2, and its values differ",
        ),
        (lambda rank: {"a": {"x": ONES}, "b": object() if rank == 1 else 1}, "found by rank 1 of 3: 'b' is an object"),
    ],
    ids=message_of,
)
def test_ranks_that_disagree(tmp_path, state_of, message):
    text = refused_save(tmp_path, state_of)
    with pytest.raises(StateError, match=message):
        raise StateError(text)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"x": ONES}, "x": ONES}, "two arrays of the state are called 'model.x'"),
        ({"a": {"b.c": ONES, "b": {"c": ONES}}}, "two arrays of the state are called 'a.b.c'"),
        ({"a": {"b.c": 1, "b": {"c": 2, "x": ONES}}}, "two values of the state are called 'a.b.c'"),
        ({"a": {1: ONES}}, "the key 1 in 'a' is no text"),
        ({"a": {"": ONES}}, "this is no name of a tensor"),
        ({"a": {"x\0y": ONES}}, "this is no name of a tensor"),
        ({"a": {"x\ud800": ONES}}, "no text that can be stored"),
        ({"a": deep(5000)}, "nested too deeply"),
        ({"a": {"__metadata__": ONES}}, "this is no name of a tensor"),
        ({"..": {"x": ONES}}, "names files, so it must be letters"),
        ({"a/b": {"x": ONES}}, "names files, so it must be letters"),
        ({"$complex128": 3}, "begins with '\\$'"),
        ({"a\ud800": 3}, "no text that can be stored"),
        ({"a": "x\ud800"}, "no text that can be stored"),
        ({"a": {"x": np.array([None])}}, "'a.x' has dtype object"),
        ({"a": {"x": ONES.astype(">f4")}}, "'a.x' has dtype >f4"),
        ({"a": {"x": np.ones(2, np.longdouble)}}, "'a.x' has dtype float128"),
        ({"a": {"x": np.ones(2, [("r", "f4")])}}, "'a.x' has dtype"),
        ({"a": {"x": np.array(["x"])}}, "'a.x' has dtype <U1"),
        ({"a": {"x": np.ma.masked_array(ONES, mask=[True, False, False])}}, "'a.x' is a masked array"),
        ({"a": np.ma.masked_array(ONES)}, "'model.a' is a masked array"),
        (itself(), "does it contain itself"),
        ({"a": {1, 2}}, "'a' is a set, which a checkpoint cannot hold"),
        ({"a": {"b": [1, lambda: 1]}}, "'a.b.1' is a function"),
        ({"a": 1 << 5000}, "'a' is a number of 5001 bits"),
        ({"a": np.longdouble(1) / 3}, "'model.a' has dtype float128"),
        ({"a": Holder({"x": [ArrayPiece.whole(ONES), ArrayPiece.whole(ONES)]})}, "pieces on one rank that overlap"),
        ({"a": Holder({"x": ArrayPiece((2, 2), np.ones((2, 2)).T, (0, 0), (2, 2), (1, 4))})}, "is none of an array"),
        (3, "the state is a int: give a dict"),
        (None, "the state is a NoneType: give a dict"),
    ],
    ids=message_of,
)
def test_states_that_cannot_be_saved(tmp_path, state, message):
    with pytest.raises(StateError, match=message) as caught:
        ferro_checkpoint.save(tmp_path / "c", state)
    str(caught.value).encode(errors="backslashreplace")
    assert os.listdir(tmp_path) == []


def test_replicas_are_compared_as_told(tmp_path):
    def state(rank):
        array = np.zeros(100_000)
        array[30_000] = rank
        return {"a": {"x": array}}

    for how, error in (("sampled", None), ("none", None), ("all", StateError)):
        for found in errors_of(
            2,
            lambda group: ferro_checkpoint.save(tmp_path / how, state(group.rank), group, check_replicas=how),  # noqa: B023
        ):
            assert type(found) is (error or type(None))
    with pytest.raises(StateError, match="check_replicas is 'some'"):
        ferro_checkpoint.save(tmp_path / "c", {"a": ONES}, check_replicas="some")


@pytest.mark.parametrize(("name", "most"), [("_MOST_TEXT_BYTES", 1000), ("_MOST_VALUES", 300)])
def test_values_that_no_record_holds(tmp_path, monkeypatch, name, most):
    monkeypatch.setattr(value_agreement, name, most)
    text = refused_save(tmp_path, lambda rank: {"few": [1], "a": {"many": list(range(200 + rank))}})
    assert "most are in 'a.many': give an array" in text or "most are in 'a': give an array" in text


def test_ranks_that_disagree_on_what_they_load(tmp_path):
    ferro_checkpoint.save(tmp_path / "c", {"a": {"x": np.ones(4), "y": np.ones(2)}, "n": 1})
    for state_of, message in (
        (lambda rank: {"a": {"x": np.zeros(4)} | ({"y": np.zeros(2)} if rank else {})}, "'a.y' is on ranks 1, 2"),
        (lambda rank: {"a": {"x": np.zeros(4 + rank // 2), "y": np.zeros(2)}}, r"\(4,\) on rank 0, and F64 \(5,\) on"),
        (lambda rank: {"a": {"x": np.zeros(4), "y": np.zeros(2, "f4")}}, "'a.y' is F64 .* and F32 .* in the state"),
        (lambda rank: {"a": {"x": np.zeros(4), "y": np.zeros(2)}, "m" if rank == 2 else "n": 0}, "lacks value 'm'"),
        (lambda rank: {"a": np.broadcast_to(0.0, 4) if rank == 1 else np.zeros(4)}, "found by rank 1 of 3.*read-only"),
    ):
        states = [state_of(rank) for rank in range(3)]
        errors = errors_of(3, lambda group: ferro_checkpoint.load(tmp_path / "c", states[group.rank], group))  # noqa: B023
        assert [type(error) for error in errors] == [StateError] * 3
        with pytest.raises(StateError, match=message):
            raise max(errors, key=lambda error: len(str(error)))
        assert not any(
            np.any(array) for state in states for array in (state["a"].values() if isinstance(state["a"], dict) else ())
        )


class Dict:
    """An object with a state dict."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": np.ma.masked_array(ONES, mask=[True, False, False])}, "is a masked array"),
        ({"$tensor": "x"}, "cannot have the key"),
        ({"a": itself()}, "does it contain itself"),
        ({"a": {1, 2}}, "'sampler.a' is a set"),
        ({"a": ONES.astype(">f4")}, "dtype >f4"),
    ],
    ids=message_of,
)
def test_state_dicts_that_cannot_be_saved(tmp_path, state, message):
    with pytest.raises(StateError, match=message):
        ferro_checkpoint.save(tmp_path / "c", {"sampler": Dict(state)})
