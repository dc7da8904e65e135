"""Ranks as threads of one process: real data through the same schedules, no socket."""

from ferro.simulated.backend import SimulatedBackend
from ferro.simulated.board import Fault
from ferro.simulated.simulate import simulate

__all__ = ["Fault", "SimulatedBackend", "simulate"]
