"""Solve Poisson's equation on a square, which is cut into blocks of rows, by the method of conjugate gradients.

    python examples/poisson.py                          one rank
    ferro run -n 4 examples/poisson.py                  four ranks on this machine
    mpiexec -n 4 python examples/poisson.py --compare   the same algorithm over mpi4py beside it

It needs NumPy and ferro[gloo]; SciPy, where it is installed, checks the result, and --plot needs matplotlib.

A step of the method communicates twice in different ways, as most programs on grids do:

  - Every rank sends its first and last row to the ranks above and below, and receives theirs: a halo exchange. It is
    one persistent operation, as requests of `Send_init` and `Recv_init` with `Startall` and `Waitall` are in MPI.
  - Two dot products, each a sum of 8 bytes over all ranks: a persistent all_reduce, `Allreduce_init` in MPI.

What is to be exchanged and summed is the same in every step, so it is checked once, before the first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import ferro

Step = Callable[[], object]
"""A persistent operation: each call runs it once."""


@dataclass(frozen=True)
class Block:
    """The rows of one rank.

    The grid has n x n unknowns, h apart, and zeros around it. A rank keeps its rows in an array that has one more row
    above and below, the halo, and one more column left and right, which stay zero:

        row 0         the last row of the rank above; zeros at the top of the grid
        rows 1..rows  this rank's unknowns, between two zeros each
        row rows + 1  the first row of the rank below; zeros at the bottom of the grid
    """

    n: int
    first: int
    rows: int
    above: int | None
    below: int | None

    @classmethod
    def of(cls, n: int, rank: int, world_size: int) -> Block:
        """Cut the rows evenly."""
        first, end = (n * number // world_size for number in (rank, rank + 1))
        above = rank - 1 if rank > 0 else None
        below = rank + 1 if rank + 1 < world_size else None
        return cls(n, first, end - first, above, below)

    def zeros(self) -> np.ndarray:
        """Make a grid of zeros: this rank's rows, and what is around them."""
        return np.zeros((self.rows + 2, self.n + 2))

    def halo(self, grid: np.ndarray) -> tuple[list[tuple[int, np.ndarray]], list[tuple[int, np.ndarray]]]:
        """Return what a step sends and what it receives: pairs of a rank and a row. Rows lie together in memory."""
        sends, recvs = [], []
        if self.above is not None:
            sends.append((self.above, grid[1]))
            recvs.append((self.above, grid[0]))
        if self.below is not None:
            sends.append((self.below, grid[self.rows]))
            recvs.append((self.below, grid[self.rows + 1]))
        return sends, recvs

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the x of the columns and the y of this rank's rows, which broadcast against each other."""
        h = 1 / (self.n + 1)
        x = h * np.arange(1, self.n + 1)
        return x[None, :], x[self.first : self.first + self.rows, None]


def exact(block: Block) -> np.ndarray:
    """The solution: a parabola in each direction, for which the differences of the grid are exact."""
    x, y = block.coordinates()
    return x * (1 - x) * y * (1 - y)


def right_side(block: Block) -> np.ndarray:
    """Minus the Laplacian of the solution, times h squared."""
    x, y = block.coordinates()
    return 2 * (x * (1 - x) + y * (1 - y)) / (block.n + 1) ** 2


def over_ferro(group: ferro.ProcessGroup, block: Block, grid: np.ndarray, number: np.ndarray) -> tuple[Step, Step]:
    """Make the two steps of communication: the halo exchange of `grid`, and the sum of `number` over all ranks."""
    sends, recvs = block.halo(grid)
    return group.persistent("exchange", sends, recvs), group.persistent("all_reduce", number, op="sum", out=number)


def over_mpi(comm: Any, block: Block, grid: np.ndarray, number: np.ndarray) -> tuple[Step, Step]:
    """Make the same steps with mpi4py, the sum persistent where the library has it (MPI 4)."""
    from mpi4py import MPI

    sends, recvs = block.halo(grid)
    messages = [comm.Recv_init(row, rank) for rank, row in recvs] + [comm.Send_init(row, rank) for rank, row in sends]

    def exchange() -> None:
        MPI.Prequest.Startall(messages)
        MPI.Request.Waitall(messages)

    try:
        request = comm.Allreduce_init(MPI.IN_PLACE, number)
    except NotImplementedError:
        return exchange, lambda: comm.Allreduce(MPI.IN_PLACE, number)

    def add() -> None:
        request.Start()
        request.Wait()

    return exchange, add


def minus_laplacian(grid: np.ndarray, out: np.ndarray) -> None:
    """Compute four times each unknown minus its four neighbours; the halo must be up to date."""
    np.multiply(grid[1:-1, 1:-1], 4, out=out)
    for neighbours in (grid[:-2, 1:-1], grid[2:, 1:-1], grid[1:-1, :-2], grid[1:-1, 2:]):
        out -= neighbours


def solve(
    block: Block, make_steps: Callable[[Block, np.ndarray, np.ndarray], tuple[Step, Step]], tolerance: float
) -> tuple[np.ndarray, int, float]:
    """Solve by conjugate gradients; return this rank's unknowns, the iterations, and the seconds of one of them.

    Source: M. R. Hestenes and E. Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952, section 3.
    """
    direction, number = block.zeros(), np.zeros(1)
    exchange_halo, add_up = make_steps(block, direction, number)

    def dot(a: np.ndarray, b: np.ndarray) -> float:
        number[0] = np.vdot(a, b)
        add_up()
        return float(number[0])

    solution = np.zeros((block.rows, block.n))
    residual = right_side(block)
    image = np.empty_like(residual)
    inner = direction[1:-1, 1:-1]  # what changes in it, changes in `direction`, whose rows are sent
    inner[...] = residual
    squared = first = dot(residual, residual)
    iterations, started = 0, time.perf_counter()
    while squared > tolerance**2 * first:
        exchange_halo()
        minus_laplacian(direction, out=image)
        step = squared / dot(inner, image)
        solution += step * inner
        residual -= step * image
        previous, squared = squared, dot(residual, residual)
        inner *= squared / previous
        inner += residual
        iterations += 1
    return solution, iterations, (time.perf_counter() - started) / max(1, iterations)


def scipy_difference(solution: np.ndarray) -> float | None:
    """Return the largest difference from SciPy's solution of the same system; None where there is no SciPy."""
    try:
        import scipy.sparse as sparse
        from scipy.sparse.linalg import spsolve
    except ImportError:
        return None
    n = len(solution)
    one_direction = sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    same = sparse.eye_array(n)
    matrix = (sparse.kron(one_direction, same) + sparse.kron(same, one_direction)).tocsc()
    expected = spsolve(matrix, right_side(Block.of(n, 0, 1)).ravel())
    return float(abs(solution.ravel() - expected).max())


def plot(solution: np.ndarray, path: str) -> None:
    """Write a picture of the solution."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4))
    image = axes.imshow(solution, extent=(0, 1, 0, 1), origin="lower")
    figure.colorbar(image, ax=axes, label="u(x, y)")
    axes.set(xlabel="x", ylabel="y", title=f"{len(solution)} x {len(solution)} unknowns")
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Solve Poisson's equation on a square by conjugate gradients.")
    parser.add_argument("--n", type=int, default=256, help="unknowns in each direction (default: 256)")
    parser.add_argument("--tolerance", type=float, default=1e-10, help="of the residual, relative (default: 1e-10)")
    parser.add_argument("--rounds", type=int, default=5, help="how often to solve; the median time counts")
    parser.add_argument("--compare", action="store_true", help="run the same over mpi4py, too, started by mpiexec")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the solution")
    return parser.parse_args(arguments)


def fault_of(args: argparse.Namespace, world_size: int) -> str | None:
    """Say what is wrong with the arguments."""
    if args.n < world_size:
        return f"--n must be at least the number of ranks, {world_size}: each has a row"
    if args.rounds < 1 or not 0 < args.tolerance < 1:
        return "--rounds must be at least 1, and --tolerance between 0 and 1"
    if args.compare:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            return f"--compare needs mpi4py and an MPI library: {error}"
        if MPI.COMM_WORLD.Get_size() != world_size:
            return f"--compare: start the ranks with mpiexec -n {world_size} python examples/poisson.py --compare"
    return None


def main() -> int:
    args = parse()
    with ferro.init("gloo") as group:
        fault = fault_of(args, group.world_size)
        if fault is not None:
            if group.rank == 0:
                print(f"poisson.py: {fault}", file=sys.stderr)
            return 1
        block = Block.of(args.n, group.rank, group.world_size)
        libraries = {"ferro": lambda *arguments: over_ferro(group, *arguments)}
        if args.compare:
            from mpi4py import MPI

            libraries["mpi4py"] = lambda *arguments: over_mpi(MPI.COMM_WORLD, *arguments)
        seconds: dict[str, list[float]] = {name: [] for name in libraries}
        found: dict[str, tuple[np.ndarray, int]] = {}
        for _ in range(args.rounds):  # in turn, so that a busy moment of the machine meets both
            for name, make_steps in libraries.items():
                solution, iterations, time_s = solve(block, make_steps, args.tolerance)
                found[name] = solution, iterations
                seconds[name].append(time_s)
        rows = [Block.of(args.n, rank, group.world_size).rows for rank in range(group.world_size)]
        for name, (solution, iterations) in found.items():
            error = float(group.all_reduce(abs(solution - exact(block)).max(), op="max"))
            slowest = float(group.all_reduce(statistics.median(seconds[name]), op="max"))
            if group.rank == 0:
                about = f"{name}: {args.n} x {args.n} unknowns on {group.world_size} ranks"
                print(f"{about}: {iterations} iterations of {1e6 * slowest:.1f} us, error {error:.1e}", flush=True)
        whole = group.gather(found["ferro"][0], root=0, sizes=rows)
        if whole is not None:
            difference = scipy_difference(whole) if args.n <= 512 else None  # its direct solver needs much memory
            if difference is not None:
                print(f"largest difference from SciPy's solution: {difference:.1e}")
            if args.plot:
                plot(whole, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
