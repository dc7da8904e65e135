"""Puts the pieces of all ranks together, and takes whole arrays apart again, as a checkpoint does; NumPy only."""

import math

import numpy as np


def places(piece):
    """The indices, in the flattened whole array, of a piece's elements."""
    assert len(piece.shape) == len(piece.start) == len(piece.extent)
    box = np.arange(math.prod(piece.shape)).reshape(piece.shape)
    box = box[tuple(slice(one, one + size) for one, size in zip(piece.start, piece.extent, strict=True))]
    assert box.shape == tuple(piece.extent), "the box leaves the array"
    own = box.reshape(-1)
    if piece.flat is not None:
        first, count = piece.flat
        assert first >= 0
        assert first + count <= own.size
        own = own[first : first + count]
    assert own.size == piece.data.size
    return own


def assemble(ranks):
    """Make whole arrays of each rank's pieces by name, and check that nothing is missing, and that replicas agree."""
    wholes, held = {}, {}
    for pieces in ranks:
        for name, piece in pieces.items():
            own, data = places(piece), np.ascontiguousarray(piece.data).reshape(-1)
            if name not in wholes:
                wholes[name] = np.empty(piece.shape, piece.data.dtype)
                held[name] = np.zeros(math.prod(piece.shape), bool)
            assert (wholes[name].shape, wholes[name].dtype) == (piece.shape, piece.data.dtype), name
            assert piece.data.flags.writeable
            flat, known = wholes[name].reshape(-1), held[name][own]
            same = flat[own[known]].tobytes() == data[known].tobytes()
            assert same or piece.replicas_may_differ, f"replicas of {name!r} differ"
            flat[own[~known]] = data[~known]
            held[name][own] = True
    for name, known in held.items():
        assert known.all(), name
        everywhere = all(pieces[name].on_all_ranks for pieces in ranks if name in pieces)
        assert not everywhere or all(name in pieces for pieces in ranks), f"{name!r} is not on all ranks"
    return wholes


def scatter(wholes, pieces):
    """Write this rank's elements of whole arrays into its pieces."""
    for name, piece in pieces.items():
        whole = wholes[name]
        assert (whole.shape, whole.dtype) == (piece.shape, piece.data.dtype), name
        piece.data[...] = whole.reshape(-1)[places(piece)].reshape(piece.data.shape)


def check_equal(found, expected):
    """Compare two dicts of arrays, bit for bit."""
    assert found.keys() == expected.keys(), (found.keys() - expected.keys(), expected.keys() - found.keys())
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), f"{name!r} differs"


class Held:
    """A copy of what a rank holds of a model and its optimizers."""

    def __init__(self, model, *optimizers):
        self.model = copied(model.checkpoint_arrays())
        names = {id(item): name for name, item in model.checkpoint_parameters().items()}
        self.optimizers = [copied(each.checkpoint_optimizer_arrays(names)) for each in optimizers]
        self.values = [each.checkpoint_values() for each in (model, *optimizers)]


def copied(pieces):
    return {name: _Copy(piece) for name, piece in pieces.items()}


class _Copy:
    def __init__(self, piece):
        self.data = piece.data.copy()
        for name in ("shape", "start", "extent", "flat", "replicas_may_differ", "on_all_ranks"):
            setattr(self, name, getattr(piece, name))


class Saved:
    """Whole arrays and values of all ranks: a checkpoint."""

    def __init__(self, held):
        self.model = assemble([each.model for each in held])
        self.optimizers = [assemble(list(ranks)) for ranks in zip(*(each.optimizers for each in held), strict=True)]
        self.values = [each.values for each in held]

    def load(self, rank, model, *optimizers):
        """Load it into a rank's objects, which may belong to another strategy."""
        objects = (model, *optimizers)
        for each in objects:
            each.prepare_checkpoint_load()
        names = {id(item): name for name, item in model.checkpoint_parameters().items()}
        scatter(self.model, model.checkpoint_arrays())
        for each, arrays in zip(optimizers, self.optimizers, strict=True):
            scatter(arrays, each.checkpoint_optimizer_arrays(names))
        for each, value in zip(objects, self.values[rank % len(self.values)], strict=True):
            each.load_checkpoint_values(value)
        model.finish_checkpoint_load()
