"""Errors of an edge's two ranks name ranks of the pipeline."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import Linear, mse_loss
from ferro_strategies.pipeline import Kind, Pipeline
from ferro_strategies.pipeline.execution.channel import StageChannel
from ferro_strategies.pipeline.execution.error_translation import translated_errors
from ferro_strategies.pipeline.execution.plan import Edge

EDGE = Edge(kind=Kind.BACKWARD, stage=3, source=5, target=7, order=(0, 1))


def translated(error, here, cause=None):
    """The translation of an error at one end of the edge, 0 or 1."""
    channel = StageChannel(SimpleNamespace(rank=here), "pp")
    with pytest.raises(ferro.FerroError) as caught, translated_errors(EDGE, channel, 1):
        raise error from cause
    return caught.value


def timeout(**ranks):
    return ferro.CollectiveTimeout("recv with rank 0", op="recv", seconds=4.0, seq=2, **ranks)


@pytest.mark.parametrize(
    ("here", "arrived", "missing", "named"), [(1, [1], [0], 5), (0, [0], [1], 7), (1, [0], [1], 7), (1, [1], [], 5)]
)
def test_a_late_transfer_names_the_missing_rank(here, arrived, missing, named):
    error = translated(timeout(arrived=arrived, missing=missing), here)
    assert type(error) is ferro.CollectiveTimeout
    assert str(error) == (
        "Pipeline on group 'pp': the output gradients of stage 3, microbatch 1, did not come from "
        f"rank 5 to rank 7 within 4 s; did not arrive: rank {named}. The pipeline can no longer "
        f"be used. Read the log of rank {named} first."
    )
    ends = (5, 7)
    assert (error.group, error.rank, error.peer) == ("pp", ends[here], ends[1 - here])
    assert (error.missing, error.arrived) == ((named,), tuple(ends[end] for end in arrived))
    assert str(error.__cause__) == "recv with rank 0"


def test_a_slow_link_is_nobodys_fault():
    error = translated(timeout(arrived=[0, 1]), 1)
    assert "within 4 s; both ranks were there" in str(error)
    assert "Raise timeout_s" in str(error)
    assert (error.arrived, error.missing) == ((5, 7), ())


@pytest.mark.parametrize(("here", "peer", "gone"), [(1, 0, 5), (0, 1, 7), (0, None, 7), (0, 0, 5)])
def test_a_lost_rank_is_named(here, peer, gone):
    lost = ferro.PeerLost("rank 0 is gone", peer=peer, host="n02")
    error = translated(lost, here)
    assert type(error) is ferro.PeerLost
    assert f"cannot come from rank 5 to rank 7: rank {gone} (host n02) is gone" in str(error)
    assert f"Read rank {gone}'s log first" in str(error)
    assert (error.group, error.peer, error.host) == ("pp", gone, "n02")
    assert translated(ferro.GroupClosed("died earlier"), here, cause=lost).peer == gone


def test_other_errors_stay_as_they_are():
    closed = ferro.GroupClosed("the group was closed")
    assert translated(closed, 0) is closed


@pytest.mark.parametrize("absent", [0, 2])
def test_every_rank_learns_which_rank_never_called_step(absent):
    """A neighbour's neighbour, too: rank 3 waits for rank 2, which waits for rank 1."""
    over = threading.Barrier(4)

    def run(group):
        pipeline = Pipeline([Linear(2, 2, dtype=np.float64)], group, microbatches=2)
        x, error = np.ones((2, 2)), None
        if group.rank != absent:
            with pytest.raises(ferro.CollectiveTimeout) as caught:
                pipeline.step(x, x, mse_loss)
            error = caught.value
        over.wait(timeout=20)
        return error

    errors = ferro.simulate(run, 4, timeout_s=0.3, run_timeout_s=30)
    for rank, error in enumerate(errors):
        if rank != absent:
            assert error.missing == (absent,)
            assert f"did not arrive within 0.3 s: rank {absent}. " in str(error)
            assert f"Read the log of rank {absent} first" in str(error)
            half = "forward" if rank > absent else "backward"
            assert f"the {half} pass of stage {rank}, microbatch 0" in str(error)
