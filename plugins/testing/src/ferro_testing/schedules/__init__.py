"""The proof, the cost and the drawing of an algorithm, for authors of algorithms and their tests."""

from ferro_testing.schedules.checker import Proof, check
from ferro_testing.schedules.cost import cost_s
from ferro_testing.schedules.drawing import table

__all__ = ["Proof", "check", "cost_s", "table"]
