"""Ranks as threads of one process: real data through the same schedules as elsewhere, and no socket."""

from ferro.errors import RankKilled
from ferro.simulated.backend import Fault, SimulatedBackend
from ferro.simulated.simulate import simulate

__all__ = ["Fault", "RankKilled", "SimulatedBackend", "simulate"]
