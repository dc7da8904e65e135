"""DeviceMesh: coordinates of ranks, and a process group along every axis."""

import itertools

import numpy as np
import pytest

import ferro
from ferro_strategies.mesh import DeviceMesh
from ferro_testing import run_ranks


def simulate(function, world_size):
    return ferro.simulate(function, world_size, timeout_s=5, run_timeout_s=20)


def members(group):
    return group.all_gather(np.array(group.global_ranks[group.rank])).tolist()


SHAPES = [(1,), (4,), (2, 3), (3, 1, 2), (2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_rank_has_a_group_along_each_axis(shape):
    names = ("a", "b", "c")[: len(shape)]
    array = np.arange(np.prod(shape)).reshape(shape)

    def run(group):
        mesh = DeviceMesh(shape, names, group)
        np.testing.assert_array_equal(mesh.ranks, array)
        assert (mesh.shape, mesh.names, mesh.ndim, mesh.size) == (shape, names, len(shape), array.size)
        here = mesh.coordinates
        assert mesh.rank_of(here) == array[here] == group.rank
        for axis, name in enumerate(names):
            line = array[(*here[:axis], slice(None), *here[axis + 1 :])].tolist()
            assert members(mesh[name]) == line
            assert (mesh[name].rank, mesh[name].name) == (here[axis], f"world.{name}")
            assert mesh.group(axis) is mesh.group(name) is mesh[name]

    simulate(run, array.size)


def test_every_rank_has_coordinates():
    def run(group):
        mesh = DeviceMesh((2, 3), ("dp", "tp"), group)
        return [mesh.coordinates_of(rank) for rank in range(6)]

    for places in simulate(run, 6):
        assert places == list(itertools.product(range(2), range(3)))


def test_an_array_gives_the_rank_at_each_coordinate_and_may_leave_ranks_out():
    array = np.array([[4, 1], [0, 3]], np.uint8)

    def run(group):
        mesh = DeviceMesh(array, ("row", "column"), group)
        if group.rank == 2:
            assert mesh.coordinates is None
            assert mesh.size == 4
            assert repr(mesh) == ("<DeviceMesh row=2, column=2 of group 'world', rank 2 not in it>")
            assert mesh.flatten(("row", "column"), "all").shape == (4,)
            for ask in (lambda: mesh["row"], lambda: mesh.group(1), lambda: mesh["row", "column"]):
                with pytest.raises(ferro.UsageError, match=r"rank 2 of group 'world' cannot"):
                    ask()
            return None
        assert mesh.coordinates_of(group.rank) == mesh.coordinates
        with pytest.raises(ferro.UsageError, match="rank 2 is not in <DeviceMesh"):
            mesh.coordinates_of(2)
        return members(mesh["row"]), members(mesh["column"])

    assert simulate(run, 5) == [([4, 0], [0, 3]), ([1, 3], [4, 1]), None, ([1, 3], [0, 3]), ([4, 0], [4, 1])]


def test_the_mesh_copies_the_array_of_ranks():
    def run(group):
        array = np.array([1, 0])
        mesh = DeviceMesh(array, ("dp",), group)
        array[:] = 7
        assert mesh.ranks.tolist() == [1, 0]
        with pytest.raises(ValueError, match="read-only"):
            mesh.ranks[0] = 1

    simulate(run, 2)


@pytest.mark.parametrize("axes", [("tp", "pp"), ("pp", "tp"), ("dp",), ("tp", "dp", "pp")])
def test_a_submesh_has_the_axes_in_the_order_asked_for(axes):
    shape, names = (2, 2, 2), ("pp", "dp", "tp")
    array = np.arange(8).reshape(shape)

    def run(group):
        mesh = DeviceMesh(shape, names, group)
        part = mesh[axes]
        for place in np.ndindex(part.shape):
            whole = list(mesh.coordinates)
            for name, at in zip(axes, place, strict=True):
                whole[names.index(name)] = at
            assert part.rank_of(place) == array[tuple(whole)]
        assert part.names == axes
        assert part.rank_of(part.coordinates) == group.rank
        for name in axes:
            assert part[name] is mesh[name]
        part.close()  # a submesh shares its groups
        return members(mesh[axes[0]])

    simulate(run, 8)


def test_a_flattened_axis_has_a_group_in_the_order_given():
    def run(group):
        mesh = DeviceMesh((2, 2, 2), ("pp", "dp", "tp"), group)
        flat = mesh.flatten(("tp", "pp"), "model")
        assert (flat.names, flat.shape) == (("model", "dp"), (4, 2))
        assert flat["dp"] is mesh["dp"]
        assert flat["model"].name == "world.model"
        dp = mesh.coordinates[1]
        assert members(flat["model"]) == [0 + 2 * dp, 4 + 2 * dp, 1 + 2 * dp, 5 + 2 * dp]
        assert flat["model"].rank == flat.coordinates[0]
        last = mesh.flatten(("dp", "tp"), "tp")  # a name that becomes free
        assert (last.names, last.shape) == (("pp", "tp"), (2, 4))
        everyone = last.flatten(("pp", "tp"), "all")
        assert members(everyone["all"]) == list(range(8))
        flat.close()
        with pytest.raises(ferro.GroupClosed):
            flat["model"].barrier()
        mesh["dp"].barrier()

    simulate(run, 8)


def test_a_submesh_can_be_flattened_and_an_axis_be_a_parent():
    def run(group):
        mesh = DeviceMesh((2, 2, 2), ("pp", "dp", "tp"), group)
        both = mesh["dp", "tp"].flatten(("dp", "tp"), "both")["both"]
        grid = DeviceMesh((2, 2), ("x", "y"), both)
        return members(both), members(grid["x"]), grid["x"].name

    results = simulate(run, 8)
    assert results[1] == ([0, 1, 2, 3], [1, 3], "world.both.x")
    assert results[6] == ([4, 5, 6, 7], [4, 6], "world.both.x")


def test_closing_a_mesh_leaves_its_parent_open():
    def run(group):
        mesh = DeviceMesh((2, 1), ("dp", "tp"), group)
        mesh.close()
        mesh.close()
        for name in mesh.names:
            with pytest.raises(ferro.GroupClosed):
                mesh[name].barrier()
        group.barrier()

    simulate(run, 2)


WRONG = {
    "no axes": ((), (), "needs at least one axis"),
    "no axes in the array": (np.array(0), (), "needs at least one axis"),
    "a name too few": ((2, 1), ("dp",), r"1 names, \('dp',\), for 2 axes"),
    "names that are one string": ((2, 1), "dp", "must be a tuple of strings, not 'dp'"),
    "no name": ((2,), ("",), "must be a tuple of strings"),
    "a name twice": ((2, 1), ("dp", "dp"), "not all different"),
    "an empty axis": ((2, 0), ("dp", "tp"), "axis 'tp' has size 0"),
    "a negative axis": ((-1, -2), ("dp", "tp"), "axis 'dp' has size -1"),
    "an empty array": (np.zeros((2, 0), int), ("dp", "tp"), "axis 'tp' has size 0"),
    "too many places": ((2, 2), ("dp", "tp"), r"\(2, 2\) has room for 4 ranks, but the group has 2"),
    "too few places": ((1,), ("dp",), "has room for 1 ranks, but the group has 2"),
    "a number": (2, ("dp",), "must be a tuple of integers, not 2"),
    "fractions": ((2.0,), ("dp",), "must be a tuple of integers"),
    "rows of ranks": (([0, 1],), ("dp",), "must be a tuple of integers.* give a NumPy array"),
    "an array of fractions": (np.array([0.0, 1.0]), ("dp",), "holds integers, not float64"),
    "a rank too high": (np.array([0, 2]), ("dp",), "no rank 2; the group has 0 to 1"),
    "a rank below 0": (np.array([0, -1]), ("dp",), "no rank -1"),
    "a rank twice": (np.array([1, 1]), ("dp",), "rank 1 stands in more than one place"),
}


@pytest.mark.parametrize(("shape", "names", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_before_anything_is_sent(shape, names, message):
    def run(group):
        with pytest.raises(ferro.UsageError, match=message):
            DeviceMesh(shape, names, group)
        assert group.all_reduce(np.array(1)) == 2  # the group is still good

    simulate(run, 2)


@pytest.mark.parametrize(
    ("shape", "names"),
    [((1, 3), ("dp", "tp")), ((3, 1), ("tp", "dp")), (np.array([[0], [2], [1]]), ("dp", "tp"))],
    ids=["shape", "names", "ranks"],
)
def test_different_arguments_are_an_error_on_every_rank(shape, names):
    def run(group):
        mine = ((3, 1), ("dp", "tp")) if group.rank != 1 else (shape, names)
        with pytest.raises(ferro.UsageError, match=r"rank 0 has axes \['dp', 'tp'\].*, rank 1 has"):
            DeviceMesh(*mine, group)

    simulate(run, 3)


def test_unknown_axes_coordinates_and_ranks_are_refused():
    def run(group):
        mesh = DeviceMesh((2, 1), ("dp", "tp"), group)
        for ask in (
            lambda: mesh["pp"],
            lambda: mesh.group(2),
            lambda: mesh.group(-1),
            lambda: mesh["dp", "pp"],
            lambda: mesh.flatten(("dp", "pp"), "x"),
        ):
            with pytest.raises(ferro.UsageError, match=r"there is no axis .*axes are dp, tp"):
                ask()
        for ask in (
            lambda: mesh["dp", "dp"],
            lambda: mesh[()],
            lambda: mesh.flatten((), "x"),
            lambda: mesh.flatten("dp", "x"),
        ):
            with pytest.raises(ferro.UsageError, match="does not name axes"):
                ask()
        with pytest.raises(ferro.UsageError, match=r"\('tp', 'tp'\) are not all different"):
            DeviceMesh((1, 1, 2), ("pp", "dp", "tp"), group).flatten(("pp", "dp"), "tp")
        for place in ((2, 0), (-1, 0), (0,), (0, 0, 0)):
            with pytest.raises(ferro.UsageError, match="there is no place"):
                mesh.rank_of(place)
        with pytest.raises(ferro.UsageError, match="rank 5 is not in"):
            mesh.coordinates_of(5)

    simulate(run, 2)


def test_pictures():
    def run(group):
        mesh = DeviceMesh((2, 2, 2), ("pp", "dp", "tp"), group)
        return repr(mesh), mesh.picture(), mesh["tp", "pp"].picture(), mesh[("pp",)].picture()

    shown, cube, square, row = simulate(run, 8)[3]
    assert shown == "<DeviceMesh pp=2, dp=2, tp=2 of group 'world', rank 3 at pp=0, dp=1, tp=1>"
    assert cube.splitlines() == [
        "pp 0",
        "      tp 0  tp 1",
        "dp 0    0     1",
        "dp 1    2    [3]",
        "pp 1",
        "      tp 0  tp 1",
        "dp 0    4     5",
        "dp 1    6     7",
    ]
    assert square.splitlines() == ["      pp 0  pp 1", "tp 0    2     6", "tp 1   [3]    7"]
    assert row.splitlines() == ["  pp 0  pp 1", "   [3]    7"]


def use_mesh(group):
    mesh = DeviceMesh(np.array([[3, 1], [0, 2]]), ("dp", "tp"), group)
    both = mesh.flatten(("tp", "dp"), "both")["both"]
    sums = [int(one.all_reduce(np.array(group.rank))) for one in (mesh["dp"], mesh["tp"], both)]
    return [*sums, members(mesh["dp"]), members(both)]


def test_groups_of_a_mesh_between_processes():
    assert run_ranks(use_mesh, 4, backend="gloo") == [
        [3, 2, 6, [3, 0], [3, 0, 1, 2]],
        [3, 4, 6, [1, 2], [3, 0, 1, 2]],
        [3, 2, 6, [1, 2], [3, 0, 1, 2]],
        [3, 4, 6, [3, 0], [3, 0, 1, 2]],
    ]
