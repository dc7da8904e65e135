"""Ranks as threads of one process: real data through the same schedules as elsewhere, and no socket."""

from ferro.simulated.backend import Fault, RankKilled, SimulatedBackend
from ferro.simulated.simulate import simulate

__all__ = ["Fault", "RankKilled", "SimulatedBackend", "simulate"]
